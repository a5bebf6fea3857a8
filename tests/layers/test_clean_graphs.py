"""Exported attention layers have at most 1.5 times the operators of a graph that was written by hand from the formula.

The hand-written graphs take any batch, height and width, as the exported ones do, and compute the same.
"""
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from zoo.biformer import GlobalAttention
from zoo.layers import DAS, ATConv, BiLevelRoutingAttention, PolarizedSelfAttention, SelectiveKernelUnit

C = 16
POLARIZED_CHANNELS = """
    query = Conv(x, channel_query.weight)
    query_row = Reshape(query, row)
    attention = Softmax(query_row)
    attention_column = Transpose<perm = [0, 2, 1]>(attention)
    flat = Reshape(x, row)
    pooled = MatMul(flat, attention_column)
    pooled_map = Unsqueeze(pooled, last)
    value = Conv(pooled_map, channel_value.weight)
"""
POLARIZED_POSITIONS = """
    mean = ReduceMean(X, sides)
    mean_query = Conv(mean, spatial_query.weight)
    mean_row = Reshape(mean_query, one_row)
"""
TO_MAP = """
    size = Shape<start = 2>(x)
    map_shape = Concat<axis = 0>(one_channel, size)
    scores_map = Reshape(scores, map_shape)
    positions = Sigmoid(scores_map)
"""
CONSTANTS = {
    "row": [0, 0, -1], "one_row": [0, 1, -1], "last": [-1], "sides": [2, 3], "one_channel": [0, 1], "first": [0], "nine": [9],
    "units": np.eye(9, dtype=np.float32).reshape(9, 1, 3, 3), "one_map": [-1, 1], "kernel_row": [-1, 1, 9], "run": np.arange(9),
    "next_run": np.arange(1, 10), "zero": np.int64(0), "one": np.int64(1), "branches": [0, 2, -1, 1, 1], "second": [1],
}


def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d, name: str) -> dict[str, Tensor]:
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    return {f"{name}.weight": conv.weight * factor[:, None, None, None], f"{name}.bias": norm.bias - norm.running_mean * factor}


def polarized_parallel():
    return PolarizedSelfAttention(C), POLARIZED_CHANNELS + """
        up = Conv(value, channel_up.weight)
        channels = Sigmoid(up)
    """ + POLARIZED_POSITIONS.replace("X", "x") + """
        key = MatMul(mean_row, spatial_value_matrix)
        products = MatMul(key, flat)
        scores = Softmax(products)
    """ + TO_MAP + """
        gate = Add(channels, positions)
        y = Mul(x, gate)
    """, lambda layer: dict(spatial_value_matrix=layer.spatial_value.weight.flatten(1))


def polarized_sequential():
    return PolarizedSelfAttention(C, "sequential"), POLARIZED_CHANNELS + """
        narrow = Conv(value, channel_up.0.weight, channel_up.0.bias)
        normal = LayerNormalization<axis = 1>(narrow, channel_up.1.weight, channel_up.1.bias)
        positive = Relu(normal)
        up = Conv(positive, channel_up.3.weight, channel_up.3.bias)
        channels = Sigmoid(up)
        z = Mul(x, channels)
    """ + POLARIZED_POSITIONS.replace("X", "z") + """
        map = Conv(z, spatial_value.weight)
        rows = Reshape(map, row)
        shares = Softmax(rows)
        scores = MatMul(mean_row, shares)
    """ + TO_MAP + """
        y = Mul(z, positions)
    """, lambda layer: {}


def selective_kernel():
    return SelectiveKernelUnit(C), """
        a = Conv<pads = [1, 1, 1, 1], group = 16>(x, a.weight, a.bias)
        u = Relu(a)
        b = Conv<pads = [2, 2, 2, 2], dilations = [2, 2], group = 16>(x, b.weight, b.bias)
        v = Relu(b)
        sum = Add(u, v)
        pooled = ReduceMean(sum, sides)
        reduced = Conv(pooled, reduce.weight, reduce.bias)
        z = Relu(reduced)
        selected = Conv(z, select.weight)
        logits = Reshape(selected, branches)
        weights = Softmax<axis = 1>(logits)
        first_weight, second_weight = Split<axis = 1, num_outputs = 2>(weights)
        wu = Squeeze(first_weight, second)
        wv = Squeeze(second_weight, second)
        yu = Mul(u, wu)
        yv = Mul(v, wv)
        y = Add(yu, yv)
    """, lambda layer: (folded(layer.convs[0], layer.norms[0], "a") | folded(layer.convs[1], layer.norms[1], "b")
                        | folded(layer.reduce, layer.norm, "reduce"))


def das():
    return DAS(C), """
        deep = Conv<pads = [1, 1, 1, 1], group = 16>(x, depthwise.weight)
        narrow = Conv(deep, pointwise.weight)
        normal = InstanceNormalization(narrow, ones, zeros)
        hidden = Gelu(normal)
        offsets = Conv<pads = [1, 1, 1, 1]>(hidden, offset.weight, offset.bias)
        sampled = DeformConv<pads = [1, 1, 1, 1]>(hidden, weight, offsets, bias)
        last_channels = Transpose<perm = [0, 2, 3, 1]>(sampled)
        even = LayerNormalization<epsilon = 1e-6>(last_channels, norm.weight, norm.bias)
        even_map = Transpose<perm = [0, 3, 1, 2]>(even)
        gate = Sigmoid(even_map)
        y = Mul(x, gate)
    """, lambda layer: dict(ones=torch.ones(layer.hidden_dim), zeros=torch.zeros(layer.hidden_dim))


def atconv():
    return ATConv(C), """
        flat = Reshape(x, row)
        length = Shape<start = 2>(flat)
        length_scalar = Squeeze(length)
        places = Range(zero, length_scalar, one)
        place = Unsqueeze(places, last)
        next_place = Add(place, one)
        next_scaled = Mul(next_place, nine)
        start = Mul(run, length)
        begun = Greater(next_scaled, start)
        scaled = Mul(place, nine)
        end = Mul(next_run, length)
        not_over = Less(scaled, end)
        inside = And(begun, not_over)
        ones_inside = Cast<to = 1>(inside)
        lengths = ReduceSum<keepdims = 0>(ones_inside, first)
        runs = Div(ones_inside, lengths)
        pooled = MatMul(flat, runs)
        pooled_map = Unsqueeze(pooled, last)
        projected = Conv(pooled_map, kernel_proj.weight, kernel_proj.bias)
        context = Squeeze(projected, last)
        active = Gelu(context)
        product = MatMul(active, generate)
        kernel = Add(product, kernel_gen.bias)
        mean = ReduceMean(kernel, last)
        inhibition = Mul(strength, mean)
        inhibited = Sub(kernel, inhibition)
        input = Conv(x, x_proj.weight, x_proj.bias)
        size = Shape<start = 2>(x)
        maps_shape = Concat<axis = 0>(one_map, size)
        maps = Reshape(input, maps_shape)
        neighbours = Conv<pads = [1, 1, 1, 1]>(maps, units)
        neighbour_rows = Reshape(neighbours, row)
        kernel_rows = Reshape(inhibited, kernel_row)
        convolved = MatMul(kernel_rows, neighbour_rows)
        shape = Shape(x)
        output = Reshape(convolved, shape)
        y = Conv(output, proj.weight, proj.bias)
    """, lambda layer: dict(generate=layer.kernel_gen.weight.t(), strength=layer.difference_control.sigmoid()[:, None])


def global_attention():
    return GlobalAttention(C, 2), """
        qkv = MatMul(x, qkv_matrix)
        heads = Reshape(qkv, heads_shape)
        parts = Transpose<perm = [2, 0, 3, 1, 4]>(heads)
        q_part, k_part, v_part = Split<axis = 0, num_outputs = 3>(parts)
        q = Squeeze(q_part, first)
        k = Squeeze(k_part, first)
        v = Squeeze(v_part, first)
        scaled = Mul(q, scale)
        k_columns = Transpose<perm = [0, 1, 3, 2]>(k)
        scores = MatMul(scaled, k_columns)
        attention = Softmax(scores)
        mixed = MatMul(attention, v)
        mixed_places = Transpose<perm = [0, 2, 1, 3]>(mixed)
        shape = Shape(x)
        out = Reshape(mixed_places, shape)
        x_map = Transpose<perm = [0, 3, 1, 2]>(x)
        context_map = Conv<pads = [2, 2, 2, 2], group = 16>(x_map, lepe.weight, lepe.bias)
        context = Transpose<perm = [0, 2, 3, 1]>(context_map)
        sum = Add(out, context)
        product = MatMul(sum, proj_matrix)
        y = Add(product, proj.bias)
    """, lambda layer: dict(qkv_matrix=layer.qkv.weight.t(), proj_matrix=layer.proj.weight.t(), scale=torch.tensor(8**-0.5),
                            heads_shape=torch.tensor([0, -1, 3, 2, 8]))


def routing():
    return BiLevelRoutingAttention(C, 2), """
        qkv_product = MatMul(x, qkv_matrix)
        qkv = Add(qkv_product, qkv.bias)
        q, k, v = Split<axis = -1, num_outputs = 3>(qkv)
        height = Shape<start = 1, end = 2>(x)
        width = Shape<start = 2, end = 3>(x)
        height_six = Add(height, six)
        h = Div(height_six, seven)
        width_six = Add(width, six)
        w = Div(width_six, seven)
        h_scalar = Squeeze(h)
        w_scalar = Squeeze(w)
        row_inside = Range(zero, h_scalar, one)
        column_inside = Range(zero, w_scalar, one)
        row_first = Mul(grid, h)
        column_first = Mul(grid, w)
        rows = Add(row_first, row_inside)
        columns = Add(column_first, column_inside)
        row_places = Unsqueeze(rows, row_axes)
        column_places = Unsqueeze(columns, column_axes)
        row_start = Mul(row_places, width)
        index = Add(row_start, column_places)
        below = GreaterOrEqual(row_places, height)
        beside = GreaterOrEqual(column_places, width)
        off = Or(below, beside)
        own_grid = Where(off, minus_one, index)
        own = Reshape(own_grid, regions_row)
        on_map = GreaterOrEqual(own, zero)
        held = Max(own, zero)
        q_flat = Reshape(q, flat_shape)
        k_flat = Reshape(k, flat_shape)
        v_flat = Reshape(v, flat_shape)
        q_regions = Gather<axis = 1>(q_flat, held)
        k_regions = Gather<axis = 1>(k_flat, held)
        v_regions = Gather<axis = 1>(v_flat, held)
        mask = Cast<to = 1>(on_map)
        mask_channels = Unsqueeze(mask, last)
        q_masked = Mul(q_regions, mask_channels)
        k_masked = Mul(k_regions, mask_channels)
        q_sum = ReduceSum<keepdims = 0>(q_masked, third)
        k_sum = ReduceSum<keepdims = 0>(k_masked, third)
        count = ReduceSum(mask, second)
        divisor = Max(count, one_float)
        q_mean = Div(q_sum, divisor)
        k_mean = Div(k_sum, divisor)
        k_mean_columns = Transpose<perm = [0, 2, 1]>(k_mean)
        affinity = MatMul(q_mean, k_mean_columns)
        counts = Squeeze(count, second)
        empty = Equal(counts, zero_float)
        possible = Where(empty, minus_infinity, affinity)
        best, routes = TopK(possible, four)
        routes_index = Unsqueeze(routes, last)
        k_routed = GatherND<batch_dims = 1>(k_regions, routes_index)
        v_routed = GatherND<batch_dims = 1>(v_regions, routes_index)
        q_heads = Reshape(q_regions, heads_shape)
        k_heads = Reshape(k_routed, heads_shape)
        v_heads = Reshape(v_routed, heads_shape)
        q_rows = Transpose<perm = [0, 1, 3, 2, 4]>(q_heads)
        k_columns = Transpose<perm = [0, 1, 3, 4, 2]>(k_heads)
        v_rows = Transpose<perm = [0, 1, 3, 2, 4]>(v_heads)
        q_scaled = Mul(q_rows, scale)
        scores = MatMul(q_scaled, k_columns)
        routed_on_map = Gather(on_map, routes)
        seen = Reshape(routed_on_map, seen_shape)
        seen_scores = Where(seen, scores, lowest)
        attention = Softmax(seen_scores)
        seen_mask = Cast<to = 1>(seen)
        seen_attention = Mul(attention, seen_mask)
        mixed = MatMul(seen_attention, v_rows)
        mixed_places = Transpose<perm = [0, 1, 3, 2, 4]>(mixed)
        out_flat = Reshape(mixed_places, flat_shape)
        places = Mul(height, width)
        key = Where(on_map, own, places)
        keys = Reshape(key, last)
        sorted, order = TopK<largest = 0>(keys, places)
        pasted = Gather<axis = 1>(out_flat, order)
        shape = Shape(x)
        out = Reshape(pasted, shape)
        v_map = Transpose<perm = [0, 3, 1, 2]>(v)
        context_map = Conv<pads = [2, 2, 2, 2], group = 16>(v_map, lepe.weight, lepe.bias)
        context = Transpose<perm = [0, 2, 3, 1]>(context_map)
        sum = Add(out, context)
        product = MatMul(sum, proj_matrix)
        y = Add(product, proj.bias)
    """, lambda layer: dict(
        qkv_matrix=layer.qkv.weight.t(), proj_matrix=layer.proj.weight.t(), scale=torch.tensor(layer.scale), six=torch.tensor([6]),
        seven=torch.tensor([7]), grid=torch.arange(7)[:, None], row_axes=torch.tensor([1, 3]), column_axes=torch.tensor([0, 2]),
        minus_one=torch.tensor(-1), regions_row=torch.tensor([49, -1]), flat_shape=torch.tensor([0, -1, C]), third=torch.tensor([2]),
        one_float=torch.tensor(1.0), zero_float=torch.tensor(0.0), minus_infinity=torch.tensor(-torch.inf), four=torch.tensor([4]),
        heads_shape=torch.tensor([0, 49, -1, 2, C // 2]), seen_shape=torch.tensor([0, 49, 1, 1, -1]),
        lowest=torch.tensor(torch.finfo(torch.float32).min))


GRAPHS = [polarized_parallel, polarized_sequential, selective_kernel, das, atconv, global_attention, routing]


def by_hand(body: str, layer: nn.Module, more: dict[str, Tensor]) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A model of the statements in `body`, and the constants and parameters that it reads, which are inputs of it."""
    known = {name: np.asarray(value) for name, value in CONSTANTS.items()}
    known |= {name: value.detach().contiguous().numpy() for name, value in (layer.state_dict() | more).items()}
    graph = onnx.parser.parse_graph("hand (float[a, b, c, d] x) => (float[a, b, c, d] y) {" + _plain(body) + "}")
    used = {name: known[_original(name, known)] for node in graph.node for name in node.input if _original(name, known)}
    types = {"float32": onnx.TensorProto.FLOAT, "int64": onnx.TensorProto.INT64}
    graph.input.extend(onnx.helper.make_tensor_value_info(name, types[str(value.dtype)], value.shape) for name, value in used.items())
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), used


def _plain(body: str) -> str:
    """Names of parameters without their dots, which the parser of ONNX text does not take."""
    return "\n".join(line.replace(".", "__") if "epsilon" not in line else line.replace("norm.", "norm__") for line in body.splitlines())


def _original(name: str, known: dict) -> str | None:
    return next((original for original in known if original.replace(".", "__") == name), None)


def exported(layer: nn.Module, x: Tensor, sides: tuple[int, int]) -> onnx.ModelProto:
    free = ({0: Dim.DYNAMIC, sides[0]: Dim.DYNAMIC, sides[1]: Dim.DYNAMIC},)
    program = torch.export.export(layer, (x,), dynamic_shapes=free, prefer_deferred_runtime_asserts_over_guards=True)
    return torch.onnx.export(program, dynamo=True, opset_version=20, input_names=["x"], verbose=False).model_proto


def operators(model: onnx.ModelProto) -> int:
    return sum(node.op_type != "Constant" for node in model.graph.node)


def run(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> np.ndarray:
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, inputs)[0]


@pytest.mark.parametrize("make", GRAPHS, ids=lambda make: make.__name__)
def test_at_most_half_more_operators_than_by_hand(make):
    torch.manual_seed(0)
    layer, body, more = make()
    layer.eval().requires_grad_(False)
    for parameter in layer.parameters():  # zeros at the start would hide what they multiply
        parameter.add_(0.1 * torch.randn_like(parameter))
    last = make in (global_attention, routing)
    hand, used = by_hand(body, layer, more(layer))
    theirs = exported(layer, torch.randn((2, 18, 20, C) if last else (2, C, 18, 20)), (1, 2) if last else (2, 3))
    for batch, height, width in ((1, 11, 8), (3, 18, 20)):
        x = torch.randn((batch, height, width, C) if last else (batch, C, height, width))
        expected = layer(x).numpy()
        np.testing.assert_allclose(run(hand, {"x": x.numpy(), **used}), expected, atol=1e-5)
        np.testing.assert_allclose(run(theirs, {"x": x.numpy()}), expected, atol=1e-5)
    assert operators(theirs) <= 1.5 * operators(hand), f"{operators(theirs)} instead of {operators(hand)}"
