"""ONNX files: MoE layers found in the graph by dominators, proved by value in ONNX Runtime, lifted to the IR."""
