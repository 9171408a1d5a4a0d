"""`python -m aligner.data FILE`: the program aligner/validate.py, under the name of what it looks at."""

import runpy

if __name__ == "__main__":
    runpy.run_module("aligner.validate", run_name="__main__", alter_sys=True)
