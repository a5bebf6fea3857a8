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

from zoo.layers import (
    DAS,
    ATConv,
    AttentionGate,
    BiLevelRoutingAttention,
    ContextBroadcast,
    DeformableTokenMerging,
    HaloAttention,
    HiLoAttention,
    PolarizedSelfAttention,
    SelectiveKernelUnit,
    TokenAwareAvgPool,
)
from zoo.layers.fully_attentional import ChannelProcessing, TokenMixing
from zoo.models.biformer import GlobalAttention

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
    "two": [2], "three": [3], "four": [4], "six": [6], "half": np.float32(0.5), "middle": [1, 2], "no_pads": [0] * 6, "from_first": [0, 0],
    "any_tokens": [0, -1, C], "any_heads": [0, -1, 2, C // 2], "any_kv_heads": [0, -1, 2, 2, C // 2],
    "minus_infinity": np.float32(-np.inf), "lowest": np.finfo(np.float32).min,
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


def context_broadcast():
    return ContextBroadcast(C), """
        mean = ReduceMean(x, middle)
        sum = Add(x, mean)
        y = Mul(sum, half)
    """, lambda layer: {}


def scaled_context_broadcast():
    return ContextBroadcast(C, scaled=True), """
        mean = ReduceMean(x, middle)
        scaled = Mul(mean, scale)
        y = Add(x, scaled)
    """, lambda layer: {}


def token_aware_pool():
    return TokenAwareAvgPool(C), """
        map = Transpose<perm = [0, 3, 1, 2]>(x)
        hidden = Conv<pads = [1, 1, 1, 1]>(map, hidden.weight, hidden.bias)
        logits = Conv<pads = [1, 1, 1, 1]>(hidden, conv2.weight)
        weights = Softmax<axis = 1>(logits)
        w0, w1, w2, w3 = Split<axis = 1, num_outputs = 4>(weights)
        near = Conv<pads = [1, 1, 1, 1], group = 16>(map, ninths)
        farther = Conv<pads = [2, 2, 2, 2], dilations = [2, 2], group = 16>(map, ninths)
        far = Conv<pads = [3, 3, 3, 3], dilations = [3, 3], group = 16>(map, ninths)
        own_part = Mul(map, w0)
        near_part = Mul(near, w1)
        farther_part = Mul(farther, w2)
        far_part = Mul(far, w3)
        two_parts = Add(own_part, near_part)
        three_parts = Add(two_parts, farther_part)
        all_parts = Add(three_parts, far_part)
        y = Transpose<perm = [0, 2, 3, 1]>(all_parts)
    """, lambda layer: folded(layer.conv1, layer.norm, "hidden") | dict(ninths=torch.full((C, 1, 3, 3), 1 / 9))


def deformable_token_merging():
    return DeformableTokenMerging(C), """
        offsets = Conv<strides = [2, 2], pads = [0, 0, 1, 1]>(x, offset.weight, offset.bias)
        merged = DeformConv<strides = [2, 2], pads = [0, 0, 1, 1]>(x, weight, offsets, bias)
        normal = BatchNormalization(merged, norm.weight, norm.bias, norm.running_mean, norm.running_var)
        y = Gelu(normal)
    """, lambda layer: {}


def attention_gate():
    return AttentionGate(C, 8), """
        size = Shape<start = 2>(x)
        odd = Mod(size, two)
        pads = Concat<axis = 0>(no_pads, odd)
        padded = Pad<mode = "edge">(x, pads)
        theta = Conv<strides = [2, 2]>(padded, theta.weight)
        phi = Conv(g, phi.weight, phi.bias)
        half_size = Shape<start = 2>(theta)
        phi_there = Resize<axes = [2, 3], mode = "linear">(phi, , , half_size)
        sum = Add(theta, phi_there)
        hidden = Relu(sum)
        scores = Conv(hidden, psi.weight, psi.bias)
        coarse = Sigmoid(scores)
        even_size = Shape<start = 2>(padded)
        fine = Resize<axes = [2, 3], mode = "linear">(coarse, , , even_size)
        attention = Slice(fine, from_first, size, sides)
        gated = Mul(x, attention)
        projected = Conv(gated, proj.weight, proj.bias)
        y = BatchNormalization(projected, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    """, lambda layer: {}


def token_mixing():
    return TokenMixing(C, 2), """
        q_product = MatMul(x, q_matrix)
        q_all = Add(q_product, q.bias)
        q_heads = Reshape(q_all, any_heads)
        q = Transpose<perm = [0, 2, 1, 3]>(q_heads)
        kv_product = MatMul(x, kv_matrix)
        kv_all = Add(kv_product, kv.bias)
        kv_heads = Reshape(kv_all, any_kv_heads)
        parts = Transpose<perm = [2, 0, 3, 1, 4]>(kv_heads)
        k_part, v_part = Split<axis = 0, num_outputs = 2>(parts)
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
        product = MatMul(out, proj_matrix)
        y = Add(product, proj.bias)
    """, lambda layer: dict(q_matrix=layer.q.weight.t(), kv_matrix=layer.kv.weight.t(), proj_matrix=layer.proj.weight.t(),
                            scale=torch.tensor(8**-0.5))


def channel_processing():
    return ChannelProcessing(C, 2, 2 * C), """
        q_map = MatMul(x, q_matrix)
        q_tokens = Reshape(q_map, any_tokens)
        q_shares = Softmax<axis = 1>(q_tokens)
        q_heads = Reshape(q_shares, any_heads)
        q_rows = Transpose<perm = [0, 2, 3, 1]>(q_heads)
        x_tokens = Reshape(x, any_tokens)
        x_shares = Softmax<axis = 1>(x_tokens)
        x_heads = Reshape(x_shares, any_heads)
        x_means = ReduceMean(x_heads, last)
        x_columns = Transpose<perm = [0, 2, 1, 3]>(x_means)
        scores = MatMul(q_rows, x_columns)
        shares = Sigmoid(scores)
        tempered = Mul(shares, temperature)
        gate = Reshape(tempered, gate_shape)
        hidden_product = MatMul(x, fc1_matrix)
        hidden = Add(hidden_product, mlp.fc1.bias)
        hidden_map = Transpose<perm = [0, 3, 1, 2]>(hidden)
        local = Conv<pads = [1, 1, 1, 1], group = 32>(hidden_map, mlp.dwconv.conv1.weight, mlp.dwconv.conv1.bias)
        active = Gelu(local)
        normal = BatchNormalization(active, mlp.dwconv.bn.weight, mlp.dwconv.bn.bias, mlp.dwconv.bn.running_mean, mlp.dwconv.bn.running_var)
        wider = Conv<pads = [1, 1, 1, 1], group = 32>(normal, mlp.dwconv.conv2.weight, mlp.dwconv.conv2.bias)
        places_last = Transpose<perm = [0, 2, 3, 1]>(wider)
        strengthened = Mul(places_last, mlp.gamma)
        sum = Add(hidden, strengthened)
        product = MatMul(sum, fc2_matrix)
        out = Add(product, mlp.fc2.bias)
        even = LayerNormalization(out, norm.weight, norm.bias)
        y = Mul(gate, even)
    """, lambda layer: dict(q_matrix=layer.q.weight.t(), fc1_matrix=layer.mlp.fc1.weight.t(), fc2_matrix=layer.mlp.fc2.weight.t(),
                            gate_shape=torch.tensor([0, 1, 1, C]))


def hilo():
    return HiLoAttention(C, 4), """
        size = Shape<start = 1, end = 3>(x)
        more = Add(size, one)
        grid = Div(more, two)
        even = Mul(grid, two)
        missing = Sub(even, size)
        pads = Concat<axis = 0>(before, missing, first)
        padded = Pad(x, pads)
        qkv_product = MatMul(padded, hi_qkv_matrix)
        qkv = Add(qkv_product, hi_qkv.bias)
        rows, columns = Split<num_outputs = 2>(grid)
        cut_shape = Concat<axis = 0>(first, rows, two, columns, parts_shape)
        cut = Reshape(qkv, cut_shape)
        apart = Transpose<perm = [5, 0, 6, 1, 3, 2, 4, 7]>(cut)
        count = Mul(rows, columns)
        windows_shape = Concat<axis = 0>(parts_heads, count, window)
        windows = Reshape(apart, windows_shape)
        q_part, k_part, v_part = Split<axis = 0, num_outputs = 3>(windows)
        q = Squeeze(q_part, first)
        k = Squeeze(k_part, first)
        v = Squeeze(v_part, first)
        height, width = Split<num_outputs = 2>(size)
        rows_scalar = Squeeze(rows)
        columns_scalar = Squeeze(columns)
        row_number = Range(zero, rows_scalar, one)
        column_number = Range(zero, columns_scalar, one)
        row_first = Mul(row_number, two)
        column_first = Mul(column_number, two)
        row_start = Unsqueeze(row_first, row_axes)
        column_start = Unsqueeze(column_first, middle)
        row_places = Add(row_start, row_inside)
        column_places = Add(column_start, column_inside)
        row_on = Less(row_places, height)
        column_on = Less(column_places, width)
        on = And(row_on, column_on)
        mask = Reshape(on, mask_shape)
        scaled = Mul(q, scale)
        k_columns = Transpose<perm = [0, 1, 2, 4, 3]>(k)
        scores = MatMul(scaled, k_columns)
        seen = Where(mask, scores, minus_infinity)
        attention = Softmax(seen)
        mixed = MatMul(attention, v)
        blocks_shape = Concat<axis = 0>(from_first, rows, columns, block_shape)
        blocks = Reshape(mixed, blocks_shape)
        together = Transpose<perm = [0, 2, 4, 3, 5, 1, 6]>(blocks)
        map_shape = Concat<axis = 0>(first, even, last)
        map = Reshape(together, map_shape)
        cropped = Slice(map, from_first, size, middle)
        hi_product = MatMul(cropped, hi_proj_matrix)
        hi = Add(hi_product, hi_proj.bias)
        x_map = Transpose<perm = [0, 3, 1, 2]>(x)
        pooled = AveragePool<kernel_shape = [2, 2], strides = [2, 2], ceil_mode = 1>(x_map)
        means = Transpose<perm = [0, 2, 3, 1]>(pooled)
        q_product = MatMul(x, lo_q_matrix)
        q_all = Add(q_product, lo_q.bias)
        q_heads = Reshape(q_all, lo_heads)
        q_lo = Transpose<perm = [0, 2, 1, 3]>(q_heads)
        kv_product = MatMul(means, lo_kv_matrix)
        kv_all = Add(kv_product, lo_kv.bias)
        kv_heads = Reshape(kv_all, lo_kv_heads)
        parts = Transpose<perm = [2, 0, 3, 1, 4]>(kv_heads)
        k_means_part, v_means_part = Split<axis = 0, num_outputs = 2>(parts)
        k_means = Squeeze(k_means_part, first)
        v_means = Squeeze(v_means_part, first)
        scaled_lo = Mul(q_lo, scale)
        k_means_columns = Transpose<perm = [0, 1, 3, 2]>(k_means)
        scores_lo = MatMul(scaled_lo, k_means_columns)
        attention_lo = Softmax(scores_lo)
        mixed_lo = MatMul(attention_lo, v_means)
        mixed_places = Transpose<perm = [0, 2, 1, 3]>(mixed_lo)
        lo_shape = Concat<axis = 0>(first, size, last)
        out = Reshape(mixed_places, lo_shape)
        lo_product = MatMul(out, lo_proj_matrix)
        lo = Add(lo_product, lo_proj.bias)
        y = Concat<axis = -1>(hi, lo)
    """, lambda layer: dict(
        {f"{name}_matrix": getattr(layer, name).weight.t() for name in ("hi_qkv", "hi_proj", "lo_q", "lo_kv", "lo_proj")},
        before=torch.tensor([0] * 5), parts_shape=torch.tensor([2, 3, 2, 4]), parts_heads=torch.tensor([3, -1, 2]),
        window=torch.tensor([4, 4]), row_axes=torch.tensor([1, 2, 3]), row_inside=torch.tensor([[0], [1]]),
        column_inside=torch.tensor([0, 1]), mask_shape=torch.tensor([-1, 1, 4]), scale=torch.tensor(0.5),
        block_shape=torch.tensor([2, 2, 4]), last=torch.tensor([8]), lo_heads=torch.tensor([0, -1, 2, 4]),
        lo_kv_heads=torch.tensor([0, -1, 2, 2, 4]))


def halo():
    return HaloAttention(C, num_heads=2, block_size=4, halo_size=1), """
        q_map = Conv(x, q.weight)
        kv_map = Conv(x, kv.weight)
        size = Shape<start = 2>(x)
        more = Add(size, three)
        grid = Div(more, four)
        even = Mul(grid, four)
        missing = Sub(even, size)
        q_pads = Concat<axis = 0>(no_pads, missing)
        q_padded = Pad(q_map, q_pads)
        after = Add(missing, one)
        kv_pads = Concat<axis = 0>(halo_before, after)
        kv_padded = Pad(kv_map, kv_pads)
        rows, columns = Split<num_outputs = 2>(grid)
        rows_scalar = Squeeze(rows)
        columns_scalar = Squeeze(columns)
        row_number = Range(zero, rows_scalar, one)
        column_number = Range(zero, columns_scalar, one)
        row_first = Mul(row_number, four)
        column_first = Mul(column_number, four)
        row_start = Unsqueeze(row_first, last)
        column_start = Unsqueeze(column_first, last)
        row_places = Add(row_start, window)
        column_places = Add(column_start, window)
        strips = Gather<axis = 2>(kv_padded, row_places)
        windows = Gather<axis = 4>(strips, column_places)
        kv_shape = Concat<axis = 0>(kv_heads, rows, six, columns, six)
        kv_windows = Reshape(windows, kv_shape)
        kv = Transpose<perm = [0, 3, 5, 1, 4, 6, 2]>(kv_windows)
        k, v = Split<axis = -1, num_outputs = 2>(kv)
        q_shape = Concat<axis = 0>(q_heads, rows, four, columns, four)
        q_blocks = Reshape(q_padded, q_shape)
        q = Transpose<perm = [0, 3, 5, 1, 4, 6, 2]>(q_blocks)
        scaled = Mul(q, scale)
        products = Einsum<equation = "nrcmijd,nrcmyxd->nrcmijyx">(scaled, k)
        by_row = Einsum<equation = "nrcmijd,iyd->nrcmijy">(q, row_table)
        by_column = Einsum<equation = "nrcmijd,jxd->nrcmijx">(q, column_table)
        by_row_all = Unsqueeze(by_row, last)
        by_column_all = Unsqueeze(by_column, before_last)
        with_rows = Add(products, by_row_all)
        scores = Add(with_rows, by_column_all)
        border = Add(size, two)
        height, width = Split<num_outputs = 2>(border)
        row_on = Less(row_places, height)
        column_on = Less(column_places, width)
        row_on_all = Unsqueeze(row_on, row_axes)
        column_on_all = Unsqueeze(column_on, column_axes)
        on = And(row_on_all, column_on_all)
        mask = Unsqueeze(on, query_axes)
        seen = Where(mask, scores, lowest)
        flat = Reshape(seen, keys_row)
        shares = Softmax(flat)
        attention = Reshape(shares, keys_window)
        mixed = Einsum<equation = "nrcmijyx,nrcmyxd->nrcmijd">(attention, v)
        together = Transpose<perm = [0, 3, 6, 1, 4, 2, 5]>(mixed)
        map_shape = Concat<axis = 0>(all_channels, even)
        map = Reshape(together, map_shape)
        y = Slice(map, from_first, size, sides)
    """, lambda layer: dict(
        halo_before=torch.tensor([0, 0, 1, 1, 0, 0]), window=torch.arange(6), kv_heads=torch.tensor([0, 2, 16]),
        q_heads=torch.tensor([0, 2, 8]), scale=torch.tensor(8**-0.5), before_last=torch.tensor([-2]), row_axes=torch.tensor([1, 3]),
        column_axes=torch.tensor([0, 2]), query_axes=torch.tensor([2, 3, 4]), keys_row=torch.tensor([0] * 6 + [-1]),
        keys_window=torch.tensor([0] * 6 + [6, 6]), all_channels=torch.tensor([0, C]),
        row_table=relative(layer.pos_embed.height_rel), column_table=relative(layer.pos_embed.width_rel))


def relative(table: Tensor) -> Tensor:
    """The vector of every query's row of a block of 4 and every key's row of its window of 6; the last query's are from 5 back."""
    return torch.stack([torch.stack([table[5 + y - i] for y in range(6)]) for i in range(4)])


FIRST = [polarized_parallel, polarized_sequential, selective_kernel, das, atconv, deformable_token_merging, attention_gate, halo]
LAST = [global_attention, routing, hilo, token_aware_pool, context_broadcast, scaled_context_broadcast, token_mixing, channel_processing]


def by_hand(body: str, layer: nn.Module, more: dict[str, Tensor], maps: list[str]) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A model of the statements in `body`, and the constants and parameters that it reads, which are inputs of it beside `maps`."""
    known = {name: np.asarray(value) for name, value in CONSTANTS.items()}
    known |= {name: value.detach().contiguous().numpy() for name, value in (layer.state_dict() | more).items()}
    inputs = ", ".join(f"float[b, {name}1, {name}2, {name}3] {name}" for name in maps)
    graph = onnx.parser.parse_graph(f"hand ({inputs}) => (float[b, y1, y2, y3] y) {{{_plain(body)}}}")
    used = {name: known[_original(name, known)] for node in graph.node for name in node.input if _original(name, known)}
    types = {"float32": onnx.TensorProto.FLOAT, "int64": onnx.TensorProto.INT64}
    graph.input.extend(onnx.helper.make_tensor_value_info(name, types[str(value.dtype)], value.shape) for name, value in used.items())
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), used


def _plain(body: str) -> str:
    """Names of parameters without their dots, which the parser of ONNX text does not take."""
    return "\n".join(line.replace(".", "__") if "epsilon" not in line else line.replace("norm.", "norm__") for line in body.splitlines())


def _original(name: str, known: dict) -> str | None:
    return next((original for original in known if original.replace(".", "__") == name), None)


def exported(layer: nn.Module, maps: dict[str, Tensor], sides: tuple[int, int]) -> onnx.ModelProto:
    free = ({0: Dim.DYNAMIC, sides[0]: Dim.DYNAMIC, sides[1]: Dim.DYNAMIC},) * len(maps)
    program = torch.export.export(layer, tuple(maps.values()), dynamic_shapes=free, prefer_deferred_runtime_asserts_over_guards=True)
    return torch.onnx.export(program, dynamo=True, opset_version=20, input_names=list(maps), verbose=False).model_proto


def operators(model: onnx.ModelProto) -> int:
    return sum(node.op_type != "Constant" for node in model.graph.node)


def run(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> np.ndarray:
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, inputs)[0]


def random_maps(make, batch: int, height: int, width: int) -> dict[str, Tensor]:
    """What the layer takes: a map, and a gate also a coarser one."""
    maps = {"x": torch.randn((batch, height, width, C) if make in LAST else (batch, C, height, width))}
    return maps | {"g": torch.randn(batch, 8, height // 2, width // 3)} if make is attention_gate else maps


@pytest.mark.parametrize("make", FIRST + LAST, ids=lambda make: make.__name__)
def test_at_most_half_more_operators_than_by_hand(make):
    torch.manual_seed(0)
    layer, body, more = make()
    layer.eval().requires_grad_(False)
    for parameter in layer.parameters():  # zeros at the start would hide what they multiply
        parameter.add_(0.1 * torch.randn_like(parameter))
    theirs = exported(layer, random_maps(make, 2, 18, 20), (1, 2) if make in LAST else (2, 3))
    for batch, height, width in ((1, 11, 8), (3, 18, 20)):
        maps = random_maps(make, batch, height, width)
        inputs = {name: x.numpy() for name, x in maps.items()}
        hand, used = by_hand(body, layer, more(layer), list(maps))
        expected = layer(**maps).numpy()
        np.testing.assert_allclose(run(hand, inputs | used), expected, atol=1e-5)
        np.testing.assert_allclose(run(theirs, inputs), expected, atol=1e-5)
    assert operators(theirs) <= 1.5 * operators(hand), f"{operators(theirs)} instead of {operators(hand)}"
