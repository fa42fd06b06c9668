"""On demand (`make test-legacy`): MoE layers of older transformers, each release in a folder of its own."""
