"""Maps the repository root to the import package ``clipmill`` (the root folder *is* the package)."""

from setuptools import find_namespace_packages, setup
from setuptools.command.build_py import build_py

ROOMS = ["pipeline", "models", "datasets", "tools"]
NOT_SHIPPED = {"setup", "conftest"}


class BuildPy(build_py):
    """Keep the build script itself out of the wheel: it sits beside ``__init__.py``."""

    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if package != "clipmill" or module[1] not in NOT_SHIPPED]


packages = find_namespace_packages(include=[room + suffix for room in ROOMS for suffix in ("", ".*")])

setup(
    packages=["clipmill", *(f"clipmill.{name}" for name in packages)],
    package_dir={"clipmill": "."},
    package_data={"clipmill": ["py.typed"], "": ["*.md", "*.json", "*.txt", "*.yaml", "*.sh"]},
    exclude_package_data={"clipmill": ["*.md", "*.json", "*.txt", "*.yaml", "*.sh"]},
    cmdclass={"build_py": BuildPy},
)
