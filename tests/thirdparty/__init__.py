"""On demand (`make test-thirdparty`): pinned packages with MoE layers that nobody here wrote."""
