"""The formulas of docstrings: their text, and the LaTeX that replaces it on the site."""

_OUT = r"\operatorname{dropout}\bigl(\operatorname{softmax}"
_SCORES = r"\operatorname{cap}(\mathrm{scale}\cdot q k^\top) + \mathrm{bias} + \mathrm{alibi},\ \text{where kept}"

FORMULAS = {
    "out = dropout(softmax(cap(scale * q @ k^T) + bias + alibi, where kept)) @ v": (
        rf"\mathrm{{out}} = {_OUT}({_SCORES})\bigr)\,v"
    ),
    "softmax(cap(scale * q @ k^T) + bias + alibi, where kept)": rf"\operatorname{{softmax}}({_SCORES})",
    "softcap * tanh(scores / softcap)": r"\mathrm{softcap}\cdot\tanh(\mathrm{scores}/\mathrm{softcap})",
    "-sum_j p_j log p_j": r"-\sum_j p_j \log p_j",
    "2^-4": r"2^{-4}",
    "D_qk ** -0.5": r"D_{qk}^{-1/2}",
    "key = stored * k_scale": r"\mathrm{key} = \mathrm{stored}\cdot\mathrm{k\_scale}",
    "-slope * distance": r"-\mathrm{slope}\cdot\mathrm{distance}",
    "q, k, v = heads(query W_q^T + b_q), heads(key W_k^T + b_k), heads(value W_v^T + b_v) "
    "out = concat(fastattn.attention(q, k, v, ...)) W_o^T + b_o": (
        r"\begin{aligned}"
        r"q, k, v &= \operatorname{heads}(\mathrm{query}\,W_q^\top + b_q),\ "
        r"\operatorname{heads}(\mathrm{key}\,W_k^\top + b_k),\ \operatorname{heads}(\mathrm{value}\,W_v^\top + b_v)\\"
        r"\mathrm{out} &= \operatorname{concat}(\operatorname{attention}(q, k, v, \ldots))\,W_o^\top + b_o"
        r"\end{aligned}"
    ),
}
