"""Environments for the tests."""


def asks_why(prompts, turns, metadata):
    """Goes on after answers that hold no w3, three messages at most."""
    return [None if "w3" in said[-1] or len(said) > 5 else f"why {1 + len(said) // 2}" for said in turns]


class Counts:
    """How often it was asked, told to whoever is asked."""

    def __init__(self):
        self.calls = 0

    def __call__(self, prompts, turns, metadata):
        self.calls += 1
        return [str(self.calls)] * len(prompts)


not_callable = 3
