"""Networks designed by measured latency: tables of it, MnasNet's search, NetAdapt (docs/search.md)."""

from .blocks import ChannelGroup, channel_groups, shrink, with_widths
from .latency import LatencyTable
from .netadapt import NetAdapted, netadapt
from .platform_aware_search import SearchResult, Trial, platform_aware_search
from .reward import reward
from .space import Architecture, Block, SearchSpace, Stage, digits_space, mnasnet_space, mobilenet_v3_space

__all__ = [
    "Architecture",
    "Block",
    "ChannelGroup",
    "LatencyTable",
    "NetAdapted",
    "SearchResult",
    "SearchSpace",
    "Stage",
    "Trial",
    "channel_groups",
    "digits_space",
    "mnasnet_space",
    "mobilenet_v3_space",
    "netadapt",
    "platform_aware_search",
    "reward",
    "shrink",
    "with_widths",
]
