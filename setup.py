"""Which packages there are; everything else about the distribution stands in pyproject.toml.

`conf/` lies beside the library and is installed as `mmpretrain.conf`: no finder sees that by itself.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["mmpretrain", "mmpretrain.*", "data_tools", "data_tools.*", "analysis", "analysis.*"]),
        "mmpretrain.conf",
    ]
)
