"""The `gpu` suite: kernels, vision encoder, prefill and decoding on CUDA, without Ray. docs/gpu.md says more."""
