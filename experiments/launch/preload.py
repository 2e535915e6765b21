"""Everything that a rank imports: the fork server loads this module once, for all ranks that it starts."""

from experiments.startup import quick_imports

with quick_imports():
    # Models import Transformers only when they are built, which every rank does.
    import transformers.integrations.moe
    import transformers.models.auto.modeling_auto
    import transformers.models.switch_transformers.modeling_switch_transformers  # noqa: F401

    import experiments.launch.local  # noqa: F401
    from experiments.registry import GROUPS, discover

    for group in GROUPS:
        discover(group)
