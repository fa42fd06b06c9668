"""Exporting to ONNX, reading ONNX, and the ONNX Runtime back end."""
