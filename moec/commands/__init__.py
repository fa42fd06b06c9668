"""The commands of the command line, one file each; moec.cli puts them together."""
