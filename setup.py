"""What pyproject.toml cannot express: ``experiments/`` is in the wheel, as ``halos_pl/experiments``."""

import shutil

from setuptools import find_namespace_packages, find_packages, setup
from setuptools.command.build_py import build_py

HOME = "halos_pl.experiments"
# The wheel leaves out the results of studies.
folders = [HOME, *(f"{HOME}.{name}" for name in find_namespace_packages("experiments", exclude=["*results*"]))]


class CleanBuild(build_py):
    """A build that starts empty; setuptools would pack files that an earlier build left and that no longer exist."""

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


setup(
    packages=[*find_packages(include=["halos_pl*", "value_functions*"]), *folders],
    package_dir={HOME: "experiments"},
    cmdclass={"build_py": CleanBuild},
)
