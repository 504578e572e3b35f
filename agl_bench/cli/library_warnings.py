"""What libraries tell programmers, which is not for those who run a command."""

from __future__ import annotations

import warnings

_LIBRARIES = (
    *("anndata", "dask", "geopandas", "h5py", "legacy_api_wrap", "numcodecs", "ome_zarr", "pandas", "PIL", "pyarrow"),
    *("scanpy", "scipy", "shapely", "tifffile", "xarray", "zarr"),
    *("agl_bench", "agl_bench_plugins"),  # many warnings are laid at the door of the caller
)


def hide_library_warnings() -> None:
    """Show no warning of a library that reads data, for the rest of the process; what they mean is checked here.

    Warnings of plug-ins and of torch are shown as they were.
    """
    warnings.filterwarnings("ignore", module=rf"({'|'.join(_LIBRARIES)})(\.|$)")
