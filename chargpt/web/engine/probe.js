// Notes what happens inside the model while it reads one token.

import { likeliest, softmax } from "./sampling.js";

/** Pass it to `GPT2.read`, then take `result`. C = d_model, T positions in the context. */
export class Probe {
  constructor() {
    this.result = { embedding: null, lens0: null, layers: [] };
    this.startLayer();
  }

  startLayer() {
    this.layer = { attention: [], lens: null, attentionNorm: null, feedForwardNorm: null };
  }

  /** After the embedding. */
  embedded(model, id, position) {
    this.result.embedding = {
      token: model.embedding("token", id).slice(), // (C,); a copy
      position: model.embedding("position", position).slice(),
      sum: model.stream.slice(0, model.config.d_model),
    };
    this.result.lens0 = lens(model);
  }

  /** When a head has its attention weights of T positions. */
  attended(model, T) {
    this.layer.attention.push(model.attended.slice(0, T));
  }

  /** Before a sublayer's update is added: notes its size as a share of the stream's. */
  updated(model) {
    const share = size(model.update) / size(model.stream);
    if (this.layer.attentionNorm === null) this.layer.attentionNorm = share;
    else this.layer.feedForwardNorm = share;
  }

  /** After a block. */
  endOfBlock(model) {
    this.layer.lens = lens(model);
    this.result.layers.push(this.layer);
    this.startLayer();
  }
}

/** What the model would predict if it ended here ("logit lens", nostalgebraist 2020). */
function lens(model) {
  return likeliest(softmax(model.predict()));
}

function size(vector) {
  return Math.hypot(...vector);
}
