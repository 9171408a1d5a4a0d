"""A stand-in for TensorRT-LLM, to run its users where it is not: on a CPU, in a process of its own as upstream's.

Put the folder above on PYTHONPATH, beside the repository's root. Names and signatures are those of the contract.
"""
