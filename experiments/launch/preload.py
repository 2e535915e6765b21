"""Everything that a rank imports: the fork server loads this module once, for all ranks that it starts."""

from experiments.startup import quick_imports

with quick_imports():
    import experiments.launch.local  # noqa: F401
    from experiments.registry import GROUPS, discover

    for group in GROUPS:
        discover(group)
