"""Files that graphs read weights from: found wherever they are named, and refused where the manifest does not list them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from edgeprune.bundle import DECODER, EMBED, MANIFEST, VISION, Bundle
from edgeprune.bundle.integrity import external_locations, record_files
from edgeprune.errors import BundleError
from edgeprune.runtime import load


def outside(name: str, location: str) -> TensorProto:
    """Return a tensor whose data lies in another file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="location", value=location)
    return tensor


def hidden_everywhere() -> tuple[onnx.ModelProto, set[str]]:
    """Return a model that names a file at every place where ONNX lets a tensor stand, and the names."""
    names = iter(f"file{number}" for number in range(100))
    tensor: Any = lambda: outside("t", next(names))  # noqa: E731
    sparse: Any = lambda: onnx.SparseTensorProto(values=tensor(), indices=tensor(), dims=[1])  # noqa: E731
    inner = helper.make_graph([helper.make_node("Constant", [], ["c"], value=tensor())], "inner", [], [], [tensor()])
    inner.sparse_initializer.append(sparse())
    node = helper.make_node("If", ["x"], ["y"], then_branch=inner)
    node.attribute.append(helper.make_attribute("many", [tensor(), tensor()]))
    node.attribute.append(onnx.AttributeProto(name="s", sparse_tensor=sparse(), type=onnx.AttributeProto.SPARSE_TENSOR))
    node.attribute.append(onnx.AttributeProto(name="ss", sparse_tensors=[sparse()], type=onnx.AttributeProto.SPARSE_TENSORS))
    graphs = [helper.make_graph([node], "deep", [], [], [tensor()])]
    node.attribute.append(onnx.AttributeProto(name="gs", graphs=graphs, type=onnx.AttributeProto.GRAPHS))
    model = helper.make_model(helper.make_graph([node], "outer", [], [], [tensor()]))
    function = onnx.FunctionProto(name="f", node=[node], attribute_proto=[helper.make_attribute("a", tensor())])
    model.functions.append(function)
    model.training_info.add(initialization=inner, algorithm=graphs[0])
    return model, {f"file{number}" for number in range(int(next(names).removeprefix("file")))}


def test_every_place_of_a_tensor_is_found(tmp_path: Path) -> None:
    model, names = hidden_everywhere()
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert len(names) > 10
    assert external_locations(tmp_path / "m.onnx") == names


@pytest.mark.parametrize("after", [b"", b"\x08\x00", b"\x10\x01", b"\x0d\0\0\0\0", b"\x11" + bytes(8)])
def test_the_last_of_two_locations_counts_as_in_protobuf(after: bytes, tmp_path: Path) -> None:
    # Key, value, value, key; and `after` them what has their numbers, but is no text, which protobuf passes over.
    entry = b"\x0a\x03xxx\x12\x01a\x12\x01b\x0a\x08location" + after
    tensor = b"\x6a" + bytes([len(entry)]) + entry
    graph = b"\x2a" + bytes([len(tensor)]) + tensor
    model = b"\x3a" + bytes([len(graph)]) + graph
    (tmp_path / "m.onnx").write_bytes(model)
    assert onnx.ModelProto.FromString(model).graph.initializer[0].external_data[0].value == "b"
    assert external_locations(tmp_path / "m.onnx") == {"b"}


def test_the_graphs_of_a_bundle_name_their_own_weights(tiny_bundle: Bundle) -> None:
    for name in (VISION, EMBED, DECODER):
        assert external_locations(tiny_bundle.file(name)) == {f"{Path(name).name}.data"}


@pytest.mark.parametrize("data", [b"\x3a\x7flocation", b"\x3b location", b"\xff" * 12 + b"location", b"\x3a", b"location\x80"])
def test_what_is_no_graph_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(data + b"location")
    with pytest.raises(BundleError, match="no ONNX graph"):
        external_locations(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    "location", ["/etc/hostname", "../../outside", "../plan.json/../../outside", "", "nothing", "*/_ORT_MEM_ADDR_/*", "a\0b"]
)
def test_weights_outside_the_list_are_refused(location: str, altered_bundle: Path) -> None:
    (altered_bundle.parent / "outside").write_bytes(b"\0" * 4)
    model = onnx.load(str(altered_bundle / EMBED), load_external_data=False)
    model.graph.initializer.append(outside("more", location))
    (altered_bundle / EMBED).write_bytes(model.SerializeToString())
    _seal(altered_bundle)
    with pytest.raises(BundleError, match="no file of the bundle"):
        load(altered_bundle, threads=1)


def _seal(folder: Path, **changes: Any) -> None:
    # As somebody would who makes a bundle of his own: the manifest fits the files.
    data = json.loads((folder / MANIFEST).read_text())
    files = {name: {"bytes": record.bytes, "sha256": record.sha256} for name, record in record_files(folder, MANIFEST).items()}
    (folder / MANIFEST).write_text(json.dumps({**data, "files": files, **changes}))
