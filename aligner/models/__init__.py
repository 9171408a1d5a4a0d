"""The networks, on Megatron-core."""

import warnings

# Megatron-core says four times on import that optional packages are missing.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
