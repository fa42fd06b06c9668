"""Models as verified ONNX files: torch models through torch.export, ONNX files rewritten in place of their layers."""
