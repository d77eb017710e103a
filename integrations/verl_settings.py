"""What both verl adapters read from verl's configuration. Needs aem.py only.

The method's settings are AEM's own names below `algorithm.aem`, which verl's files don't have, so
they are added with a plus: `+algorithm.aem.lam=0.5 +algorithm.aem.min_range=0.1`.
"""

import math

from aem import UsageError

DEFAULTS = {"lam": 1.0, "min_range": 0.1}  # lambda; the gate, in nats


def read_settings(config) -> dict:
    """AEM's settings in verl's configuration, those left out by default: {"lam", "min_range"}.

    Raises:
        UsageError: if one of them is wrong, or a setting of verl leaves AEM nothing to work with.
    """
    correction = config.algorithm.get("rollout_correction")
    if correction is not None and correction.get("bypass_mode"):
        raise UsageError(
            "algorithm.rollout_correction.bypass_mode must be False: AEM needs the entropies that "
            "verl computes with the old log-probs, which this mode leaves out"
        )
    # subtle: 'gspo' is fine, verl's form of it takes a gradient per token
    if config.actor_rollout_ref.actor.policy_loss.get("loss_mode") == "geo_mean":
        raise UsageError(
            "actor_rollout_ref.actor.policy_loss.loss_mode can't be geo_mean: it averages the "
            "advantages of a row, and with them the alphas of its turns"
        )
    given = config.algorithm.get("aem")
    settings = DEFAULTS if given is None else {**DEFAULTS, **given}
    for name, value in settings.items():
        if name not in DEFAULTS:
            raise UsageError(f"algorithm.aem.{name} is unknown, there are: {', '.join(DEFAULTS)}")
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise UsageError(f"algorithm.aem.{name} must be a number from 0 on, not {value}")
    return dict(settings)
