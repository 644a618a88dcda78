"""To and from the folders of diffusers' pipelines: the format, not the library. JSON and safetensors, no pickle."""

from pipelines.interop.folder import Portable, export_diffusers, is_diffusers, read_diffusers, write_diffusers
from pipelines.interop.parameters import parameter_names, parameter_shapes
from pipelines.interop.spec import spec_of

__all__ = [
    "Portable",
    "export_diffusers",
    "is_diffusers",
    "parameter_names",
    "parameter_shapes",
    "read_diffusers",
    "spec_of",
    "write_diffusers",
]
