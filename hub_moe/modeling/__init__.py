from .configuration_hub_moe import HubMoeConfig
__all__ = ["HubMoeConfig"]
