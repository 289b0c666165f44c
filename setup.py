"""Packages and extras. ``kernels/``, ``data_prep/`` and ``launcher/`` install as parts of ``lightbulb``, because a
top-level package named ``kernels`` would collide with the one Hugging Face publishes."""

from setuptools import find_packages, setup

MAPPED = {"lightbulb.kernels": "kernels", "lightbulb.data_prep": "data_prep", "lightbulb.launcher": "launcher"}

packages = find_packages(include=["lightbulb", "lightbulb.*"])
for package, folder in MAPPED.items():
    packages += [package, *(f"{package}.{child}" for child in find_packages(folder))]

setup(
    packages=packages,
    package_dir={"lightbulb": "lightbulb", **MAPPED},
)
