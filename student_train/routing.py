"""Which entropy a share of positions means: found once, from a store, before the first step.

A threshold in nats makes the choice at a position depend on nothing but that position, so that it
is the same however rows fall on devices, micro-batches or steps.
"""

from logit_store.statistics import entropy_quantile
from schemas.runs import TrainConfig

SAMPLE_SEQUENCES = 256


def definite(config: TrainConfig) -> TrainConfig:
    """The config with `routing.below_nats` filled in, if a share is asked for.

    The same for everyone who reads the same store: the sample is of evenly spaced rows.
    """
    routing = config.routing
    if not routing.drop_share or config.targets is None:
        return config
    below = entropy_quantile(config.store, config.targets, routing.drop_share, SAMPLE_SEQUENCES)
    return config.model_copy(update={"routing": routing.model_copy(update={"below_nats": below})})
