"""Pictures of every number format become uint8 RGB of the right brightness, or one line that names the camera."""

import numpy as np
import pytest

from vla.processing.pictures import check_eight_bits, to_uint8_picture

PICTURE = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3) * 4


def test_uint8_is_returned_as_it_is():
    assert to_uint8_picture(PICTURE, name="front") is PICTURE
    batch = np.stack([PICTURE, PICTURE])
    assert to_uint8_picture(batch, name="front") is batch


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_in_0_to_1_keep_their_brightness(dtype):
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    np.testing.assert_array_equal(to_uint8_picture((every / 255).astype(dtype), name="front"), every)


def test_slight_overshoot_of_a_resampling_filter_is_clipped():
    picture = np.full((2, 2, 3), 1.01, np.float32)
    picture[0] = -0.01
    assert to_uint8_picture(picture, name="front")[:, 0, 0].tolist() == [0, 255]


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64, np.uint32])
def test_wider_integers_within_0_to_255_are_the_same_picture(dtype):
    np.testing.assert_array_equal(to_uint8_picture(PICTURE.astype(dtype), name="front"), PICTURE)
    np.testing.assert_array_equal(to_uint8_picture(PICTURE.tolist(), name="front"), PICTURE)


def test_grey_gets_three_channels_and_alpha_is_dropped():
    grey = PICTURE[..., 0]
    three = np.repeat(grey[..., None], 3, axis=-1)
    np.testing.assert_array_equal(to_uint8_picture(grey, name="front"), three)
    np.testing.assert_array_equal(to_uint8_picture(grey[..., None] / 255, name="front"), three)
    alpha = np.concatenate([PICTURE, np.full((4, 5, 1), 9, np.uint8)], axis=-1)
    np.testing.assert_array_equal(to_uint8_picture(alpha, name="front"), PICTURE)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.full((4, 5, 3), 300), r"int64 values from 300 to 300, pictures are uint8 in 0\.\.255"),
        (np.full((4, 5, 3), -1), r"int64 values from -1 to -1"),
        (np.full((4, 5, 3), 200, np.uint16), r"16-bit pictures \(depth in millimetres\?\).*leave this camera out"),
        (np.full((4, 5, 3), 200.0), r"float64 values from 200 to 200: floats must be in 0\.\.1"),
        (np.full((4, 5, 3), -1.0, np.float32), r"float32 values from -1 to -1: floats must be in 0\.\.1"),
        (np.full((4, 5, 3), np.nan), "NaN or infinity"),
        (np.ones((4, 5, 3), bool), "true and false"),
        (np.zeros((3, 4, 5), np.uint8), r"shape \(H, W, 3\), got \(3, 4, 5\), channels first"),
        (np.zeros((4, 5, 2), np.uint8), r"got \(4, 5, 2\)"),
        (np.zeros(5, np.uint8), r"got \(5,\)"),
        (np.zeros((0, 5, 3), np.uint8), "empty picture"),
        (np.array(["a"]), "array of numbers"),
        (None, "array of numbers"),
    ],
)
def test_whatever_would_be_a_guess_is_refused_in_one_line(picture, message):
    with pytest.raises(ValueError, match=rf"camera 'front'.*{message}") as problem:
        to_uint8_picture(picture, name="front")
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize("mode", ["I;16", "I", "F", "I;16B"])
def test_files_of_more_than_eight_bits_are_refused(mode):
    with pytest.raises(ValueError, match=r"feature 'd' holds a picture of more than 8 bits .*--cameras.*is_depth_map"):
        check_eight_bits(mode, "feature 'd' holds a picture")


def test_eight_bit_files_pass():
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"):
        check_eight_bits(mode, "")
