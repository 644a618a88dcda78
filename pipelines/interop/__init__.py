"""To and from the folders of diffusers' DDPMPipeline: the format, not the library. JSON and safetensors, no pickle."""

from pipelines.interop.folder import Portable, export_diffusers, is_diffusers, read_diffusers, write_diffusers
from pipelines.interop.parameters import parameter_names

__all__ = ["Portable", "export_diffusers", "is_diffusers", "parameter_names", "read_diffusers", "write_diffusers"]
