"""The states of weights that are refitted in place, whoever holds them.

    IDLE -> QUIESCED -> PREFLIGHT -> WRITING -> VERIFIED -> IDLE with the new version
                           |             |
                  IDLE, unchanged    POISONED, until a whole refit succeeds

Before the first write everything is checked and nothing changed. After it the weights are a mixture until all of them
have been read back, and nobody may sample from them.
"""

from collections.abc import Callable
from enum import Enum

from torch import Tensor


class State(Enum):
    IDLE = "idle"
    QUIESCED = "quiesced"
    PREFLIGHT = "preflight"
    WRITING = "writing"
    VERIFIED = "verified"
    POISONED = "poisoned"


class Refitted:
    """The state and version of weights.

    version: -1 before the first. refusal: why they cannot be sampled from; empty when they can.
    """

    def __init__(self):
        self.state, self.version, self.refusal = State.IDLE, -1, ""

    def check(self) -> None:
        """Raise RuntimeError where the weights are a mixture."""
        if self.refusal:
            raise RuntimeError(f"sampler: the weights are a mixture, because {self.refusal}; refit all of them again.")

    def expect_newer(self, version: int) -> None:
        """Raise ValueError for a version that the weights have, or have passed."""
        if version <= self.version:
            raise ValueError(
                f"sampler: refit to version {version}, but the weights are of version {self.version} already; "
                "versions go up."
            )

    def refit(
        self,
        plan,
        source,
        version: int,
        manifest: dict,
        storage: Callable[[], dict[str, Tensor]],
        *,
        finish: Callable[[dict[str, Tensor]], None] = lambda storage: None,
    ) -> int:
        """Execute a refit.plan.Plan from its source. Returns the bytes written.

        manifest, storage: the destination's, storage by parameter name and asked for once all is quiet.
        finish: called after the last copy, before the new version is told. Whoever samples has stopped already.
        Raises what the two sides raise. RuntimeError while another refit runs.
        """
        if self.state not in (State.IDLE, State.POISONED):
            raise RuntimeError(f"refit: another one is {self.state.value}; wait for it.")
        before = self.state
        try:
            self.expect_newer(version)
            self.state = State.QUIESCED
            destination = storage()
            self.state = State.PREFLIGHT
            plan.preflight(source, manifest, destination)
            self.state = State.WRITING
            self.refusal = f"the refit to version {version} was interrupted"
            written = plan.execute(source, destination)
            finish(destination)
            self.state = State.VERIFIED
            self.version, self.refusal = version, ""
        except Exception as error:
            if self.state is State.WRITING:
                self.refusal = f"the refit to version {version} failed after its first write ({error})"
            raise
        finally:
            if self.state is State.WRITING:
                self.state = State.POISONED
            elif self.state is State.VERIFIED:
                self.state = State.IDLE
            elif self.state is not State.POISONED:
                self.state = before
        return written
