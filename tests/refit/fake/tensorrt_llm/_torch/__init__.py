"""As upstream's PyTorch backend is called."""
