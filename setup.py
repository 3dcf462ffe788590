"""Ships ``experiments/`` in the wheel as ``halos_pl/experiments``, which pyproject.toml cannot express."""

from setuptools import find_namespace_packages, find_packages, setup

HOME = "halos_pl.experiments"
# The wheel leaves out the results of studies.
folders = [HOME, *(f"{HOME}.{name}" for name in find_namespace_packages("experiments", exclude=["*results*"]))]

setup(
    packages=[*find_packages(include=["halos_pl*", "value_functions*"]), *folders],
    package_dir={HOME: "experiments"},
)
