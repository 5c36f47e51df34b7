// The exported functions: result, name, arguments. A new function needs one line here and a call in
// record.py, which reads these lines, too. P is a pointer to values, Ps an array of such pointers.

FUNCTION(Status, attention_forward_fp32, P, P, P, Long, Long, Long, Long, Double, Seed)
FUNCTION(Status, attention_backward_fp32, P, P, P, P, P, Long, Long, Long, Long, Double, Seed)
FUNCTION(Status, layer_norm_forward_fp32, P, P, P, P, P, P, Long, Long, Float)
FUNCTION(Status, layer_norm_backward_fp32, P, P, P, P, P, P, P, P, P, Long, Long)
FUNCTION(Status, linear_forward_fp32, P, P, P, P, Long, Long, Long)
FUNCTION(Status, linear_backward_fp32, P, P, P, P, P, P, Long, Long, Long)
FUNCTION(Status, feed_forward_forward_fp32, P, P, P, P, P, P, P, Long, Long, Long)
FUNCTION(Status, feed_forward_backward_fp32, P, P, P, P, P, P, P, P, P, P, Long, Long, Long)
FUNCTION(Status, residual_forward_fp32, P, P, P, Long, Double, Seed)
FUNCTION(Status, residual_backward_fp32, P, P, Long, Double, Seed)
FUNCTION(Status, muon_fp32, Ps, Ps, Ps, P, P, Long, Float, Float, P, Int)
FUNCTION(Handle, decoder_new, P, Float, Ps)
FUNCTION(Nothing, decoder_forward, Handle, Long, P, P, P, Long, P, P, Int)
FUNCTION(Nothing, decoder_copy, Handle, Int, Int, Int)
FUNCTION(Nothing, decoder_free, Handle)
