"""Which layouts a model fits, and what each rank of one holds."""

from aligner.models.shape import ModelShape
from aligner.run.distributed import ParallelConfig


def check(parallel: ParallelConfig, shape: ModelShape, what: str = "the model") -> None:
    """Raise ValueError, one sentence, when `shape` cannot be dealt to the ranks of the layout."""
    t = parallel.tensor
    for name, count in (
        ("attention heads", shape.heads),
        ("key-value heads", shape.kv_heads),
        ("inner MLP columns", shape.ffn),
        ("vocabulary entries", shape.vocab),
    ):
        if count % t:
            fits = [n for n in range(1, count + 1) if all(x % n == 0 for x in _split(shape))]
            raise ValueError(
                f"parallel.tensor is {t}, which does not divide the {count} {name} of {what}; "
                f"expected one of {', '.join(map(str, fits))}."
            )
    stages = parallel.pipeline * parallel.virtual_pipeline
    if shape.num_layers % stages:
        virtual = f" x parallel.virtual-pipeline {parallel.virtual_pipeline}" if parallel.virtual_pipeline > 1 else ""
        fits = [n for n in range(1, shape.num_layers + 1) if shape.num_layers % n == 0]
        raise ValueError(
            f"parallel.pipeline {parallel.pipeline}{virtual} makes {stages} stages, which do not divide the "
            f"{shape.num_layers} layers of {what}; expected stages out of {', '.join(map(str, fits))}."
        )


def _split(shape: ModelShape) -> tuple[int, ...]:
    return shape.heads, shape.kv_heads, shape.ffn, shape.vocab
