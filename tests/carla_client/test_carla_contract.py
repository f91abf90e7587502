"""The stand-in has no method that CARLA's client does not have, and the same arguments in the same order."""

import inspect
import re

import carla_stand_in
import pytest
from carla_maps import carla

CLASSES = (
    "Client", "World", "TrafficManager", "BlueprintLibrary", "ActorBlueprint", "ActorAttribute", "Actor",
    "Vehicle", "Walker", "Sensor",
)  # fmt: skip
MEMBERS = [
    (name, member)
    for name in CLASSES
    for member in vars(getattr(carla_stand_in, name))
    if not member.startswith("_") or (name, member) == ("Client", "__init__")
]


def real_signatures(name: str, member: str) -> list[tuple[list[str], str]]:
    """Of each overload in Boost.Python's docstring, the arguments without self and what is returned."""
    doc = inspect.getattr_static(getattr(carla, name), member).__doc__
    found = re.findall(rf"^{member}\( ?(.*)\) -> (\w+) :$", doc, re.MULTILINE)
    return [(re.findall(r"\(\w+\)(\w+)", arguments)[1:], returned) for arguments, returned in found]


@pytest.mark.parametrize("name, member", MEMBERS)
def test_the_real_client_has_it_with_the_same_arguments(name, member):
    ours = inspect.getattr_static(getattr(carla_stand_in, name), member)
    theirs = getattr(getattr(carla, name), member, None)
    assert theirs is not None, f"carla.{name} has no {member}"
    if isinstance(ours, property):
        assert isinstance(theirs, property)
        return
    signature = inspect.signature(ours)
    arguments = list(signature.parameters)[1:]
    real = real_signatures(name, member)
    assert (arguments, signature.return_annotation) in real


def test_docstrings_are_read_as_meant():
    assert real_signatures("World", "tick") == [(["seconds"], "int")]
    assert real_signatures("Actor", "set_transform") == [(["transform"], "None")]


@pytest.mark.parametrize(
    "kind, names",
    [
        ("Image", ["frame", "height", "width", "raw_data"]),
        ("CollisionEvent", ["frame", "normal_impulse", "other_actor"]),
    ],
)
def test_what_sensors_give_exists(kind, names):
    for name in names:
        assert isinstance(getattr(getattr(carla, kind), name), property)


def test_the_client_is_the_version_that_the_package_asks_for():
    assert carla.Client("localhost", 2000).get_client_version() == carla_stand_in.VERSION
