"""TensorRT-LLM as a process that samples and pulls its weights, in its own environment: `python -m aligner.trtllm`.

It loads no weights: the trainer's refit brings them. Programs start one with `--sampler trtllm --trtllm.python`, or
find those that run elsewhere by `--trtllm.url`.
"""

import argparse
import os
import sys
import threading
from dataclasses import asdict, fields
from pathlib import Path

from aligner.models.shape import ModelShape
from aligner.rollout.trtllm import TrtllmSampler
from aligner.rollout.trtllm_api import EngineConfig, engine_arguments, load_api
from aligner.rollout.wire import serve
from aligner.run.secret import read_secret


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m aligner.trtllm", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder; its config is read")
    parser.add_argument("--context", type=int, required=True, help="tokens of a sequence, at most")
    parser.add_argument("--listen", required=True, help="host:port, or the path of a local socket")
    parser.add_argument("--key-file", required=True, help="file with the key that the trainer gives too")
    parser.add_argument("--with-parent", action="store_true", help="end when standard input is closed")
    for f in fields(EngineConfig):
        parser.add_argument("--" + f.name.replace("_", "-"), type=type(f.default), default=f.default)
    return parser.parse_args(argv)


def end_with_parent() -> None:
    """The parent holds the other end of standard input for as long as it lives, killed or not."""
    while os.read(0, 1):  # of the descriptor: sys.stdin's lock would be in the way of an orderly exit
        pass
    os._exit(0)


def main(argv: list[str] | None = None) -> int:
    given = parse(argv)
    if given.with_parent:
        threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        key, api = read_secret(given.key_file, "key-file").encode(), load_api()
        config = EngineConfig(**{f.name: getattr(given, f.name) for f in fields(EngineConfig)})
        arguments = engine_arguments(api, given.model, given.context, config)
        shape = asdict(ModelShape.from_folder(given.model))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sampler = TrtllmSampler.start(api, arguments, config)
    known = {
        "model": str(given.model),
        "shape": shape,
        "tensor": config.tensor,
        "context": given.context,
        "engine": api.version,
    }
    print(f"TensorRT-LLM {api.version} answers at {given.listen}", flush=True)
    serve(sampler, given.listen, key, known)
    return 0


if __name__ == "__main__":
    sys.exit(main())
