// The exported functions: result, name, arguments. A new function needs one line here and a call in
// record.py, which reads these lines, too. P is a pointer to values, Ps an array of such pointers. A
// KERNEL exists for two value types: `_fp32`, and `_bf16` where the processor supports it.

KERNEL(Status, attention_forward, P, P, P, Long, Long, Long, Long, Double, Seed)
KERNEL(Status, attention_backward, P, P, P, P, P, Long, Long, Long, Long, Double, Seed)
KERNEL(Status, layer_norm_forward, P, P, P, P, P, P, Long, Long, Float)
KERNEL(Status, layer_norm_backward, P, P, P, P, P, P, P, P, P, Long, Long)
KERNEL(Status, linear_forward, P, P, P, P, Long, Long, Long)
KERNEL(Status, linear_backward, P, P, P, P, P, P, Long, Long, Long)
KERNEL(Status, feed_forward_forward, P, P, P, P, P, P, P, Long, Long, Long)
KERNEL(Status, feed_forward_backward, P, P, P, P, P, P, P, P, P, P, Long, Long, Long)
KERNEL(Status, residual_forward, P, P, P, Long, Double, Seed)
KERNEL(Status, residual_backward, P, P, Long, Double, Seed)
KERNEL(Status, muon, Ps, Ps, Ps, P, P, Long, Float, Float, P, Int)
FUNCTION(Handle, decoder_new, P, Float, Ps)
FUNCTION(Nothing, decoder_forward, Handle, Long, P, P, P, Long, P, P, Int)
FUNCTION(Nothing, decoder_copy, Handle, Int, Int, Int)
FUNCTION(Nothing, decoder_free, Handle)
