"""Align large language models with human preferences."""

import warnings

# Megatron-core says on import, several times, that optional packages are missing, and later that an option of its own
# has an old default.
for _words in ("Transformer Engine and Apex are not installed", "Apex is not installed", "full scope is deprecated"):
    warnings.filterwarnings("ignore", message=_words)
warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)  # it calls them
del _words
