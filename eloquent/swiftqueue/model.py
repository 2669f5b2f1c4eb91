"""The predictor in torch: a causal Transformer over a connection's observations.

The model reads *events* (`History.on_observation`) and is asked by *queries* (`History.query`).
It knows no positions, only distances, so the last W events are all it needs: a ring of W keys
and values for each layer, fed event by event, computes the same as the pass over a whole
sequence that is written here (`eloquent.swiftqueue.inference` is that, in numpy).

Sizes are those of `Shape`: E event features, Q query features, D = width, H = heads, d = D / H,
F = feed, W = window. Weights are stored as torch has them, (outputs, inputs); `x @ w.T + b`.

Event i, sent at t[i] (seconds; differences count), in the order in which they became known:

    x = event @ embed.weight.T + embed.bias                                        (D,)
    for each layer n, under the prefix `layers.{n}.`:
        y = rms(x) * attention_norm.weight
        q, k, v = split(y @ qkv.weight.T, 3), each (D,) = (H, d), heads outermost
        for j = i - W + 1 .. i (itself included; those that exist), in each head h:
            score[j] = q . k[j] / sqrt(d)
                     + distance_bias[h, i - j]                                     (H, W)
                     + time_slope[h] * log1p(abs(t[i] - t[j]) / TIME_UNIT_S)       (H,)
        a = sum of softmax(score)[j] * v[j], heads side by side                    (D,)
        x = x + a @ out.weight.T
        y = rms(x) * feed_norm.weight
        x = x + relu(y @ up.weight.T + up.bias) @ down.weight.T + down.bias        (F,) inside
    h = rms(x) * norm.weight
    rms(x) = x / sqrt(mean(x * x) + RMS_EPSILON)

Keys and values of a layer are thus those that event j had when it was computed, with all that it
had seen before: the same as in a ring of the last W. They are in the ring before i attends.

The head, for a query u about the newest event's h:

    y = relu([h, u] @ head.hidden.weight.T + head.hidden.bias)
    y = relu(y @ head.middle.weight.T + head.middle.bias)
    z = y @ head.out.weight.T + head.out.bias + u @ head.skip.weight.T             (2 * 5,)
    z = z.reshape(2, 5): for each `Queue` (L, C)
        z[0]                                   median, scaled
        z[0] + softplus(z[1])                  0.9 quantile, scaled
        z[0] + softplus(z[1]) + softplus(z[2]) 0.99 quantile, scaled
        z[3]                                   point, scaled
        z[4]                                   logit of the probability of a drop
    seconds = DELAY_UNIT_S * expm1(clip(scaled, 0, MAX_SCALED)); probability = sigmoid(logit)

Files: `weights/swiftqueue.safetensors` holds these tensors in float32 under these names (layer 0:
`layers.0.qkv.weight`); `weights/swiftqueue.json` beside it holds {"shape": Shape.as_dict(),
"levels": LEVELS, ...}. RMS_EPSILON, TIME_UNIT_S and the delay's scale are constants of
`eloquent.swiftqueue.shape`.
"""
