"""Front ends: each finds MoE and FFN layers in one kind of model and lifts them into the IR."""
