// GPT-2 ("Language Models are Unsupervised Multitask Learners", Radford et al. 2019, section 2.3),
// as in chargpt/model.py, for one token at a time:
//
//     id ─► token + position embedding ─► n_layer × block ─► LayerNorm ─► head ─► logits
//
// A block adds to the residual stream twice: first attention, the only layer where positions see
// each other, then a feed-forward network. A cache keeps the keys and values of earlier positions.
//
// Shapes: T positions so far, C = d_model, H heads, D = C / H head size, F = d_ff, V vocabulary.
// A vector or matrix ends in zeros up to a multiple of 4, because of how products are computed.

import { ACTIVATIONS } from "./activations.js";
import { openProducts } from "./products.js";
import { Memory, decodeWeights, padded } from "./weights.js";

const EPSILON = 1e-5; // in LayerNorm, against a division by 0

/** A decoder-only transformer that reads one token after another. */
export class GPT2 {
  /**
   * @param {object} config the fields of GPT2Config in chargpt/config.py
   * @param {StoredTensor[]} tensors where the weights are in `bytes`
   * @param {Uint8Array} bytes
   * @param {Uint8Array | null} wasm see `openProducts`
   */
  constructor(config, tensors, bytes, wasm) {
    this.config = config;
    this.activation = ACTIVATIONS[config.activation_function];
    const counter = new Memory(null);
    this.takeMemory(counter, tensors);
    const { buffer, multiply, backend } = openProducts(counter.used, wasm);
    this.multiply = multiply;
    this.backend = backend;
    this.takeMemory(new Memory(buffer), tensors);
    decodeWeights(tensors, bytes, this.weights);
  }

  /** Takes memory for the weights, the cache and the vectors that a forward pass writes. */
  takeMemory(memory, tensors) {
    const { block_size, d_model, d_ff, n_head, n_layer, vocab_size } = this.config;
    this.weights = memory.tensors(tensors);
    this.finalNorm = this.layer("final_norm");
    this.blocks = Array.from({ length: n_layer }, (_, i) => this.makeBlock(i, memory));
    this.stream = memory.vector(d_model); // the residual stream, (C,)
    this.normed = memory.vector(d_model); // (C,)
    this.update = memory.vector(d_model); // what a sublayer adds to the stream, (C,)
    this.qkv = memory.vector(3 * d_model); // query, key and value of all heads, (3C,)
    this.mixed = memory.vector(d_model + 3); // values mixed by attention, (C,); see `mix`
    this.attended = memory.vector(block_size); // attention weights of a head, (T,)
    this.hidden = memory.vector(d_ff); // (F,)
    this.logits = memory.vector(vocab_size); // (V,)
    const starts = Array.from({ length: n_head }, (_, head) => (head * d_model) / n_head);
    this.queries = starts.map((start) => this.qkv.subarray(start)); // H × (D,) and what follows
    this.mixedOfHead = starts.map((start) => this.mixed.subarray(start)); // the same
  }

  /** Collects the weights of a block, and takes memory for its keys and values. */
  makeBlock(i, memory) {
    const { block_size, d_model, n_head } = this.config;
    const D = d_model / n_head;
    const heads = Array.from({ length: n_head });
    return {
      attention: this.residualLayer(`blocks.${i}.attention`, ["qkv", "projection"]),
      feedForward: this.residualLayer(`blocks.${i}.feed_forward`, ["expand", "projection"]),
      keys: heads.map(() => memory.matrix(block_size, D)), // H × (T, D)
      values: heads.map(() => memory.matrix(D, block_size)), // H × (D, T)
    };
  }

  /** Collects the weights of a sublayer's linear layers and of the LayerNorms around it. */
  residualLayer(name, linears) {
    const parts = {};
    for (const norm of ["norm", "sublayer_norm", "sum_norm"]) {
      parts[norm] = this.layer(`${name}.${norm}`);
    }
    for (const linear of linears) parts[linear] = this.layer(`${name}.sublayer.${linear}`);
    return parts;
  }

  /** Returns a layer's weight, and its bias if it has one; null: the model has no such layer. */
  layer(name) {
    const weight = this.weights.get(`${name}.weight`);
    return weight ? { weight, bias: this.weights.get(`${name}.bias`) } : null;
  }

  /**
   * Reads a token after those at positions 0 … position − 1, and leaves the residual stream in
   * `stream`.
   * @param {number} id
   * @param {number} position
   * @param {Probe | null} probe notes what happens inside
   */
  read(id, position, probe = null) {
    this.embed(id, position);
    probe?.embedded(this, id, position);
    for (const block of this.blocks) {
      this.residual(block.attention, (x) => this.attend(block, x, position, probe), probe);
      this.residual(block.feedForward, (x) => this.feedForward(block.feedForward, x), probe);
      probe?.endOfBlock(this);
    }
  }

  /** Puts the sum of token and position embedding into the stream. */
  embed(id, position) {
    const token = this.embedding("token", id);
    const place = this.embedding("position", position);
    for (let i = 0; i < this.config.d_model; i++) this.stream[i] = token[i] + place[i];
  }

  /** Returns a row of the token or position embedding, (C,). */
  embedding(kind, row) {
    const { values, stride, columns } = this.weights.get(`${kind}_embedding.weight`);
    return values.subarray(row * stride, row * stride + columns);
  }

  /**
   * Adds a sublayer's update to the stream. Only the LayerNorms of the model's placement exist:
   *
   *     pre        x + f(norm(x))           GPT-2
   *     post       norm(x + f(x))           Vaswani et al. 2017
   *     sandwich   x + norm(f(norm(x)))     Ding et al. 2021 (CogView), section 2.4
   */
  residual(layer, sublayer, probe) {
    sublayer(this.norm(layer.norm, this.stream, this.normed));
    this.norm(layer.sublayer_norm, this.update, this.update);
    probe?.updated(this);
    for (let i = 0; i < this.config.d_model; i++) this.stream[i] += this.update[i];
    this.norm(layer.sum_norm, this.stream, this.stream);
  }

  /** Puts LayerNorm (Ba et al. 2016) of x into `result` and returns it; without a layer, x. */
  norm(layer, x, result) {
    if (!layer) return x;
    const { weight, bias } = layer;
    const C = this.config.d_model;
    let mean = 0;
    let variance = 0;
    for (let i = 0; i < C; i++) mean += x[i] / C;
    for (let i = 0; i < C; i++) variance += (x[i] - mean) ** 2 / C;
    const scale = 1 / Math.sqrt(variance + EPSILON);
    for (let i = 0; i < C; i++) result[i] = (x[i] - mean) * scale * weight[i] + (bias?.[i] ?? 0);
    return result;
  }

  /** A linear layer: result = weight × x + bias. */
  linear({ weight, bias }, x, result) {
    const { values, rows, stride } = weight;
    this.multiply(result, values, x, padded(rows), stride, stride);
    if (bias) for (let i = 0; i < rows; i++) result[i] += bias[i];
  }

  /** Multi-head attention (Vaswani et al. 2017, section 3.2) from the new position to all so far. */
  attend({ attention, keys, values }, x, position, probe) {
    this.linear(attention.qkv, x, this.qkv);
    for (let head = 0; head < this.config.n_head; head++) {
      this.remember(keys[head], values[head], head, position);
      this.weigh(keys[head], this.queries[head], position + 1);
      probe?.attended(this, position + 1);
      this.mix(values[head], this.mixedOfHead[head], position + 1);
    }
    this.linear(attention.projection, this.mixed, this.update);
  }

  /** Stores the new key as a row and the new value as a column: both serve as rows of a product. */
  remember(keys, values, head, position) {
    const C = this.config.d_model;
    const D = keys.columns;
    for (let i = 0; i < D; i++) {
      keys.values[position * keys.stride + i] = this.qkv[C + head * D + i];
      values.values[i * values.stride + position] = this.qkv[2 * C + head * D + i];
    }
  }

  /**
   * Computes the attention weights of T positions: softmax(keys × query / √D). If D is not a multiple
   * of 4, the product reads the next head's query, too, and multiplies it by zeros.
   */
  weigh(keys, query, T) {
    const weights = this.attended;
    this.multiply(weights, keys.values, query, padded(T), keys.stride, keys.stride);
    const scale = 1 / Math.sqrt(keys.columns);
    let largest = -Infinity;
    for (let t = 0; t < T; t++) largest = Math.max(largest, weights[t]);
    let sum = 0;
    for (let t = 0; t < T; t++) sum += weights[t] = Math.exp((weights[t] - largest) * scale);
    for (let t = 0; t < T; t++) weights[t] /= sum;
    weights.fill(0, T, padded(T)); // the cache may hold positions of an earlier context there
  }

  /**
   * Adds up the values of T positions by their weights. If D is not a multiple of 4, the product
   * writes zeros to the next head's place, too, which is computed later.
   */
  mix(values, mixed, T) {
    const rows = padded(values.rows);
    this.multiply(mixed, values.values, this.attended, rows, padded(T), values.stride);
  }

  /** Two linear layers with an activation function between them. */
  feedForward({ expand, projection }, x) {
    this.linear(expand, x, this.hidden);
    for (let i = 0; i < this.config.d_ff; i++) this.hidden[i] = this.activation(this.hidden[i]);
    this.linear(projection, this.hidden, this.update);
  }

  /**
   * Returns what the stream says about the next token: final LayerNorm, then the head, whose
   * weights are the token embeddings (Press & Wolf 2017).
   * @returns {Float32Array} logits, (V,)
   */
  predict() {
    const x = this.norm(this.finalNorm, this.stream, this.normed);
    this.linear(this.layer("token_embedding"), x, this.logits);
    return this.logits.slice(0, this.config.vocab_size);
  }
}
