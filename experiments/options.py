"""Makes the configuration known to Hydra: its schema, the components as choices, and the help text about them."""

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from experiments.choices import help_text
from experiments.config import Options
from experiments.discovery import register_components


def register_options() -> None:
    """Store everything that conf/config.yaml refers to; call it before Hydra composes."""
    ConfigStore.instance().store(name="schema", node=Options)
    register_components()
    OmegaConf.register_new_resolver("help_on_choices", help_text, replace=True)
