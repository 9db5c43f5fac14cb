"""The Triton path, for CUDA. Nothing imports triton before an evaluator is made."""
