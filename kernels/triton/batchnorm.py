"""Batch norm in Triton: mean and centred second moment of each channel, and normalisation with given statistics.

The moments are taken in the two stages of kernels/cuda/bn_moments.cu.
"""

import torch
import triton
import triton.language as tl

from spos_fast.kernels.matrix import activation, image, matrix, tl_wide

BLOCKS = 1024  # about what fills the largest GPUs; fixed, so that every GPU gives the same bits


@triton.jit
def moments_of_chunk(
    x,
    partial,
    samples,
    samples_per_chunk,
    pixels,
    channels,
    sample_stride,
    channel_stride,
    pixel_stride,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Stage one. Program (channel block, chunk of samples, group); a tile is BLOCK_PIXELS x BLOCK_CHANNELS.

    partial: [groups, chunks, 3, channels]: of each chunk pivot, mean and second moment. The mean is kept in two parts,
    pivot + mean, with the pivot (the chunk's first pixel) near the values: a mean far from zero then costs the second
    moment no digits.
    """
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    chunk = tl.program_id(1)
    group = tl.program_id(2)
    in_range = channel < channels
    first = chunk * samples_per_chunk
    last = tl.minimum(first + samples_per_chunk, samples)

    first_pixel = x + (group * samples + first).to(tl.int64) * sample_stride + channel.to(tl.int64) * channel_stride
    pivot = tl.load(first_pixel, mask=in_range, other=0.0).to(WIDE)
    count = tl.zeros([BLOCK_CHANNELS], WIDE)
    mean = tl.zeros([BLOCK_CHANNELS], WIDE)
    m2 = tl.zeros([BLOCK_CHANNELS], WIDE)
    for sample in range(first, last):
        # 64-bit: a batch can hold more than 2^31 values.
        start = x + (group * samples + sample).to(tl.int64) * sample_stride
        columns = start + channel[None, :].to(tl.int64) * channel_stride
        for begin in range(0, pixels, BLOCK_PIXELS):
            pixel = begin + tl.arange(0, BLOCK_PIXELS)
            mask = (pixel < pixels)[:, None] & in_range[None, :]
            tile = tl.load(columns + pixel[:, None] * pixel_stride, mask=mask, other=0.0).to(WIDE)
            tile = tl.where(mask, tile - pivot[None, :], 0.0)
            n = tl.minimum(pixels - begin, BLOCK_PIXELS).to(WIDE)
            centre = tl.sum(tile, axis=0) / n
            residual = tl.where(mask, tile - centre[None, :], 0.0)
            square = tl.sum(residual * residual, axis=0)
            # Chan, Golub and LeVeque, 1979.
            total = count + n
            delta = centre - mean
            mean += delta * (n / total)
            m2 += square + delta * delta * (count * n / total)
            count = total
    out = partial + (group * tl.num_programs(1) + chunk) * 3 * channels + channel
    tl.store(out, pivot, mask=in_range)
    tl.store(out + channels, mean, mask=in_range)
    tl.store(out + 2 * channels, m2, mask=in_range)


@triton.jit
def merge_chunks(
    partial,
    mean_out,
    m2_out,
    chunks,
    per_chunk,
    count,
    channels,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Stage two, in double. Program (channel block, group); every chunk but the last holds per_chunk values."""
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    group = tl.program_id(1)
    in_range = channel < channels
    merged = tl.zeros([BLOCK_CHANNELS], tl.float64)
    mean = tl.zeros([BLOCK_CHANNELS], tl.float64)
    m2 = tl.zeros([BLOCK_CHANNELS], tl.float64)
    for begin in range(0, chunks, BLOCK_CHUNKS):
        chunk = begin + tl.arange(0, BLOCK_CHUNKS)
        mask = (chunk < chunks)[:, None] & in_range[None, :]
        source = partial + (group * chunks + chunk)[:, None] * 3 * channels + channel[None, :]
        means = tl.load(source, mask=mask, other=0.0).to(tl.float64)
        means += tl.load(source + channels, mask=mask, other=0.0).to(tl.float64)
        squares = tl.load(source + 2 * channels, mask=mask, other=0.0).to(tl.float64)
        left = tl.maximum(count - chunk.to(tl.int64) * per_chunk, 0)
        n = tl.minimum(left, per_chunk).to(tl.float64)[:, None]
        n_tile = tl.sum(n, axis=0)
        centre = tl.sum(means * n, axis=0) / n_tile
        residual = tl.where(mask, means - centre[None, :], 0.0)
        square = tl.sum(squares + residual * residual * n, axis=0)
        total = merged + n_tile
        delta = centre - mean
        mean += delta * (n_tile / total)
        m2 += square + delta * delta * (merged * n_tile / total)
        merged = total
    out = group * channels + channel
    tl.store(mean_out + out, mean.to(mean_out.dtype.element_ty), mask=in_range)
    tl.store(m2_out + out, m2.to(m2_out.dtype.element_ty), mask=in_range)


@triton.jit(do_not_specialize=["samples", "pixels", "channels"])
def normalize_kernel(
    x,
    scale,
    shift,
    out,
    samples,
    pixels,
    channels,
    sample_stride,
    channel_stride,
    pixel_stride,
    out_sample_stride,
    out_channel_stride,
    out_pixel_stride,
    RELU: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Program (block of pixels of a sample, channel block). scale, shift: [groups, channels]; `samples` a group."""
    blocks = tl.cdiv(pixels, BLOCK_PIXELS)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = tl.program_id(0) % blocks * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    in_range = channel < channels
    mask = (pixel < pixels)[:, None] & in_range[None, :]
    rows, columns = pixel[:, None].to(tl.int64), channel[None, :].to(tl.int64)
    value = tl.load(x + sample * sample_stride + rows * pixel_stride + columns * channel_stride, mask=mask).to(WIDE)
    group = sample // samples * channels
    value = activation(value, scale + group, shift + group, channel, in_range, RELU)
    to = out + sample * out_sample_stride + rows * out_pixel_stride + columns * out_channel_stride
    tl.store(to, value.to(out.dtype.element_ty), mask=mask)


def tile_shape(channels_last: bool, pixels: int, channels: int) -> tuple[int, int]:
    """(BLOCK_PIXELS, BLOCK_CHANNELS): long in the direction in which memory runs, 2048 values at most."""
    if channels_last:
        across = min(64, max(16, triton.next_power_of_2(channels)))
        return min(2048 // across, max(16, triton.next_power_of_2(pixels))), across
    along = min(512, max(16, triton.next_power_of_2(pixels)))
    return along, 4


def bn_moments(x: torch.Tensor, groups: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch both stages on x's device; see spos_fast.ops.bn_moments, which checks the arguments."""
    batch, channels, height, width = x.shape
    if height > 1 and width > 1 and x.stride(2) != width * x.stride(3):
        x = x.contiguous()  # the pixels must be one run
    pixel_stride = x.stride(3) if width > 1 else x.stride(2) if height > 1 else 1
    samples, pixels = batch // groups, height * width
    block_pixels, block_channels = tile_shape(x.stride(1) == 1, pixels, channels)
    blocks = triton.cdiv(channels, block_channels)
    wanted = max(1, BLOCKS // (blocks * groups))
    samples_per_chunk = triton.cdiv(samples, wanted)
    chunks = triton.cdiv(samples, samples_per_chunk)

    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    partial = torch.empty((groups, chunks, 3, channels), dtype=wide, device=x.device)
    mean = torch.empty((groups, channels), dtype=wide, device=x.device)
    m2 = torch.empty_like(mean)
    moments_of_chunk[(blocks, chunks, groups)](
        x,
        partial,
        samples,
        samples_per_chunk,
        pixels,
        channels,
        x.stride(0),
        x.stride(1),
        pixel_stride,
        BLOCK_PIXELS=block_pixels,
        BLOCK_CHANNELS=block_channels,
        WIDE=tl.float64 if wide == torch.float64 else tl.float32,
    )
    merge_chunks[(triton.cdiv(channels, 32), groups)](
        partial,
        mean,
        m2,
        chunks,
        samples_per_chunk * pixels,
        samples * pixels,
        channels,
        BLOCK_CHUNKS=16,
        BLOCK_CHANNELS=32,
    )
    return mean, m2


def bn_normalize(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, relu: bool, groups: int = 1
) -> torch.Tensor:
    """Launch the kernel on x's device; see spos_fast.ops.bn_normalize, which checks the arguments."""
    batch, channels, height, width = x.shape
    channels_last = channels > 1 and x.stride(1) == 1
    if channels_last:
        # A group's pixels are one run, whatever samples they are of.
        rows, out = matrix(x), image(x, channels, height, width)
        runs, pixels = groups, rows.shape[0] // groups
        strides = pixels * rows.stride(0), 1, rows.stride(0)
        out_strides = pixels * channels, 1, channels
    else:
        if height > 1 and width > 1 and x.stride(2) != width * x.stride(3):
            x = x.contiguous()
        rows, out = x, torch.empty(x.shape, dtype=x.dtype, device=x.device)
        runs, pixels = batch, height * width
        strides = x.stride(0), x.stride(1), x.stride(3) if width > 1 else x.stride(2) if height > 1 else 1
        out_strides = channels * pixels, pixels, 1
    block_pixels, block_channels = tile_shape(channels_last, pixels, channels)
    normalize_kernel[(runs * triton.cdiv(pixels, block_pixels), triton.cdiv(channels, block_channels))](
        rows,
        scale.contiguous(),
        shift.contiguous(),
        out,
        runs // groups,
        pixels,
        channels,
        *strides,
        *out_strides,
        RELU=relu,
        WIDE=tl_wide(x),
        BLOCK_PIXELS=block_pixels,
        BLOCK_CHANNELS=block_channels,
    )
    return out
