"""The reward model: one number for a whole response, and its training."""

from aligner.models.critic import Critic


class RewardModel(Critic):
    """A critic that is read after the tokens of the mask, not before them: scores in place of values.

    r = w . h_T + b,   T the last token of the response, the one that the batch's mask names
    """

    shift = 0
