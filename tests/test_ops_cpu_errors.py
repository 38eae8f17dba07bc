"""Wrong input to the compiled CPU kernels: every check names the operator, what it expected and what it found."""

import pytest
import torch

from m2m_stylegan.ops import build

pytestmark = pytest.mark.skipif(not build.ready('cpu'), reason=f'CPU operators: {build.prepare("cpu").reason}')

X, F, S, NOISE = torch.zeros(2, 3, 4, 5), torch.ones(4, 4), torch.zeros(2, 3), torch.zeros(1, 1, 4, 5)  # noise of one sample for all
ONES, PADS, CONVOLUTION = (1, 1, 1, 1), (0, 0, 0, 0), (False, 1.0)
LRELU, TANH, EPILOGUE = (1, 2, 0.2, 1.0, -1.0), (1, 3, 0.2, 1.0, -1.0), (0.2, 1.0, -1.0)
ALL5, DX, DSCALE, DNOISE, ALL3 = [True] * 5, [True] + [False] * 4, [False, True] + [False] * 3, [False, False, True, False, False], [True] * 3
RECTIFIER = 'expected alpha >= 0 and gain > 0, found '

WRONG = {
    'upfirdn2d': [
        ((X[0], F, *ONES, *PADS, *CONVOLUTION), 'expected x [N, C, H, W], found shape [3, 4, 5]'),
        ((X, F[0], *ONES, *PADS, *CONVOLUTION), 'expected a filter [taps_y, taps_x] Float or Double, found [4] Float'),
        ((X, F[:0], *ONES, *PADS, *CONVOLUTION), 'expected a filter [taps_y, taps_x] Float or Double, found [0, 4] Float'),
        ((X, F.half(), *ONES, *PADS, *CONVOLUTION), 'expected a filter [taps_y, taps_x] Float or Double, found [4, 4] Half'),
        ((X, F, 1, 0, 1, 1, *PADS, *CONVOLUTION), 'expected up and down of at least 1, found up (x, y) = (1, 0), down (x, y) = (1, 1)'),
        ((X, F, *ONES, 0, 0, -1, 0, *CONVOLUTION),
         'expected a padded input of at least 4 x 4 (height x width), the size of the filter, found 3 x 5'),
        ((X.int(), F, *ONES, *PADS, *CONVOLUTION), 'expected x of dtype Float, Double, Half or BFloat16, found Int'),
    ],
    'bias_act': [
        ((X, None, 1, 9, 0.2, 1.0, -1.0), 'expected an activation index from 0 to 8, found 9'),
        ((X, S[0], 4, 2, 0.2, 1.0, -1.0), 'expected a dimension of x [2, 3, 4, 5] for the bias, found 4'),
        ((X, S, *LRELU), 'expected b [3] Float for dimension 1 of x [2, 3, 4, 5], found [2, 3] Float'),
        ((X, S[0].double(), *LRELU), 'expected b [3] Float for dimension 1 of x [2, 3, 4, 5], found [3] Double'),
        ((X.int(), None, *LRELU), 'expected x of dtype Float, Double, Half or BFloat16, found Int'),
    ],
    'bias_act_grad': [
        ((X, X, None, None, *LRELU), 'expected y for activation 2, found None'),
        ((X, None, None, X, *TANH), 'expected x for activation 3, found None'),
        ((X, None, None, X.double(), *LRELU), 'expected y of the shape and dtype of dy, [2, 3, 4, 5] Float, found [2, 3, 4, 5] Double'),
        ((X.long(), None, None, X.long(), *LRELU), 'expected dy of dtype Float, Double, Half or BFloat16, found Long'),
        ((X, X, S, None, *TANH), 'expected b [3] Float for dimension 1'),
        ((X, None, None, X, 1, -1, 0.2, 1.0, -1.0), 'expected an activation index from 0 to 8, found -1'),
        ((X, None, None, X, 1, 2, 0.2, 0.0, -1.0), RECTIFIER + 'alpha = 0.2, gain = 0'),
    ],
    'bias_act_grad2': [
        ((X, X[:1], X, None, *TANH), 'expected dy of the shape and dtype of ddx, [2, 3, 4, 5] Float, found [1, 3, 4, 5] Float'),
        ((X, X, X[:1], None, *TANH), 'expected x of the shape and dtype of ddx, [2, 3, 4, 5] Float, found [1, 3, 4, 5] Float'),
        ((X, X, X, None, *LRELU), 'expected an activation index from 3 to 8, found 2'),
    ],
    'epilogue': [
        ((X[0], None, None, None, None, *EPILOGUE), 'expected x [N, C, H, W], found shape [3, 4, 5]'),
        ((X, S[0], None, None, None, *EPILOGUE), 'expected scale [2, 3] Float for features [2, 3, 4, 5] Float, found [3] Float'),
        ((X.half(), S.half(), None, None, None, *EPILOGUE), 'expected scale [2, 3] Float for features [2, 3, 4, 5] Half, found [2, 3] Half'),
        ((X, None, X, None, None, *EPILOGUE), 'expected noise [N or 1, 1, H, W] Float for features [2, 3, 4, 5] Float, found [2, 3, 4, 5] Float'),
        ((X, None, None, S[0, 0], None, *EPILOGUE), 'expected noise with strength, found None'),
        ((X, None, NOISE, S, None, *EPILOGUE), 'expected strength [] Float for features [2, 3, 4, 5] Float, found [2, 3] Float'),
        ((X, None, None, None, S[0].double(), *EPILOGUE), 'expected b [3] Float for features [2, 3, 4, 5] Float, found [3] Double'),
        ((X.int(), None, None, None, None, *EPILOGUE), 'expected x of dtype Float, Double, Half or BFloat16, found Int'),
    ],
    'epilogue_grad': [
        ((X[0], None, X, None, None, None, *EPILOGUE, DX), 'expected dy [N, C, H, W], found shape [3, 4, 5]'),
        ((X, None, None, None, None, None, *EPILOGUE, DX), 'expected y, found None'),
        ((X, None, X, S, None, None, *EPILOGUE, DSCALE), 'expected x, found None'),
        ((X, None, X[:1], None, None, None, *EPILOGUE, DX), 'expected y of the shape and dtype of dy, [2, 3, 4, 5] Float, found [1, 3, 4, 5] Float'),
        ((X, None, X, None, None, None, *EPILOGUE, DNOISE), "expected noise, whose or whose strength's gradient is asked for, found None"),
        ((X, X, X, S, NOISE[..., :1], None, *EPILOGUE, ALL5), 'expected noise [N or 1, 1, H, W] Float for features [2, 3, 4, 5] Float'),
        ((X, None, X, None, None, None, -0.1, 1.0, -1.0, DX), RECTIFIER + 'alpha = -0.1, gain = 1'),
    ],
    'epilogue_grad2': [
        ((X, None, X, None, X, S, *EPILOGUE, ALL3), 'expected ddscale for the gradient of x, found None'),
        ((X, S, X, None, X, S, *EPILOGUE, ALL3), 'expected x, found None'),
        ((X, S, X, X, None, S, *EPILOGUE, ALL3), 'expected y, found None'),
        ((X[:1], S, X, X, X, S, *EPILOGUE, ALL3), 'expected ddx of the shape and dtype of dy, [2, 3, 4, 5] Float, found [1, 3, 4, 5] Float'),
        ((X, S[0], X, X, X, S, *EPILOGUE, ALL3), 'expected ddscale [2, 3] Float for features [2, 3, 4, 5] Float, found [3] Float'),
        ((X, S, X, X, X, S, 0.2, -1.0, -1.0, ALL3), RECTIFIER + 'alpha = 0.2, gain = -1'),
    ],
}


@pytest.mark.parametrize('op, args, message', [(op, *case) for op, cases in WRONG.items() for case in cases],
                         ids=[f'{op}-{i}' for op, cases in WRONG.items() for i in range(len(cases))])
def test_wrong_input(op, args, message):
    with pytest.raises(RuntimeError) as caught:
        getattr(torch.ops.m2m_stylegan, op)(*args)
    first_line = str(caught.value).splitlines()[0]
    assert message in first_line and first_line.replace('"', '').startswith(op)
