"""Custom nodes for ComfyUI: solvers, grids and plans of `samplers`. How to install them is in README.md.

The folder works where it is and as a copy in ComfyUI/custom_nodes. It imports `samplers`, and `comfy` only when a node
runs.
"""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
