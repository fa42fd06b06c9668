"""Layers in graphs: closed parts of an fx.Graph around some weights, looked at as modules, and written back."""
