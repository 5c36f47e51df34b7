// GPT-2 ("Language Models are Unsupervised Multitask Learners", Radford et al. 2019, section 2.3), as in
// chargpt/model.py, for one token at a time:
//
//     id ─► token + position embedding ─► n_layer × block ─► LayerNorm ─► head ─► logits
//
// A block adds to the residual stream twice: first attention, the only layer where positions see each
// other, then a feed-forward network. The keys and values of earlier positions are kept in a cache.
//
// Shapes: T positions so far, C = d_model, H heads, D = C / H head size, F = d_ff, V vocabulary.
// Vectors end in zeros up to a multiple of 4 where a product reads or writes them.

import { ACTIVATIONS } from "./activations.js";
import { openProducts } from "./products.js";
import { Memory, bytesFor, decodeWeights, padded } from "./weights.js";

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
    const size = bytesFor(tensors) + 4 * numbersToCompute(config);
    const { buffer, multiply, backend } = openProducts(size, wasm);
    this.config = config;
    this.multiply = multiply;
    this.backend = backend;
    const memory = new Memory(buffer);
    this.weights = decodeWeights(tensors, bytes, memory);
    this.activation = ACTIVATIONS[config.activation_function];
    this.blocks = Array.from({ length: config.n_layer }, (_, i) => this.makeBlock(i, memory));
    this.makeVectors(memory);
  }

  /** Collects the weights of a block, and takes memory for its keys and values. */
  makeBlock(i, memory) {
    const { block_size, d_model, n_head } = this.config;
    const D = d_model / n_head;
    return {
      attention: this.residualLayer(`blocks.${i}.attention`, ["qkv", "projection"]),
      feedForward: this.residualLayer(`blocks.${i}.feed_forward`, ["expand", "projection"]),
      keys: Array.from({ length: n_head }, () => memory.matrix(block_size, D)), // H × (T, D)
      values: Array.from({ length: n_head }, () => memory.matrix(D, block_size)), // H × (D, T)
    };
  }

  /** Collects the weights of a sublayer and of the LayerNorms around it. */
  residualLayer(name, linears) {
    const layer = {};
    for (const norm of ["norm", "sublayer_norm", "sum_norm"]) layer[norm] = this.pair(`${name}.${norm}`);
    for (const linear of linears) layer[linear] = this.pair(`${name}.sublayer.${linear}`);
    return layer;
  }

  /** Returns a weight with its bias, if there is one; null: the model has no such layer. */
  pair(name) {
    const weight = this.weights.get(`${name}.weight`);
    return weight ? { weight, bias: this.weights.get(`${name}.bias`) } : null;
  }

  /** Takes memory for the vectors that a forward pass writes; see `numbersToCompute`. */
  makeVectors(memory) {
    const { block_size, d_model, d_ff, n_head, vocab_size } = this.config;
    const D = d_model / n_head;
    this.stream = memory.vector(padded(d_model)); // the residual stream, (C,)
    this.normed = memory.vector(padded(d_model)); // (C,)
    this.update = memory.vector(padded(d_model)); // what a sublayer adds to the stream, (C,)
    this.qkv = memory.vector(padded(3 * d_model) + 4); // a query, key and value, (3C,)
    this.mixed = memory.vector(padded(d_model) + 4); // the values that attention mixed, (C,)
    this.attended = memory.vector(padded(block_size)); // attention weights, (T,)
    this.hidden = memory.vector(padded(d_ff)); // (F,)
    this.logits = memory.vector(padded(vocab_size)); // (V,)
    const heads = Array.from({ length: n_head }, (_, head) => head * D);
    this.queries = heads.map((start) => this.qkv.subarray(start)); // (D,) each, and what follows
    this.mixedOfHead = heads.map((start) => this.mixed.subarray(start));
  }

  /**
   * Reads a token after those at positions 0 … position − 1; leaves the residual stream in `stream`.
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
    const tokens = this.weights.get("token_embedding.weight"); // (V, C)
    const positions = this.weights.get("position_embedding.weight"); // (block_size, C)
    for (let i = 0; i < this.config.d_model; i++) {
      this.stream[i] = tokens.values[id * tokens.stride + i] + positions.values[position * positions.stride + i];
    }
  }

  /**
   * Adds a sublayer's update to the stream. The layer has the norms of its placement:
   * pre: x + f(norm(x)); post: norm(x + f(x)); sandwich: x + norm(f(norm(x))).
   */
  residual(layer, sublayer, probe) {
    sublayer(this.norm(layer.norm, this.stream, this.normed));
    this.norm(layer.sublayer_norm, this.update, this.update);
    probe?.updated(this);
    for (let i = 0; i < this.config.d_model; i++) this.stream[i] += this.update[i];
    this.norm(layer.sum_norm, this.stream, this.stream);
  }

  /** LayerNorm (Ba et al. 2016) of x into `result`, which is returned; without a norm, x. */
  norm(norm, x, result) {
    if (!norm) return x;
    const C = this.config.d_model;
    let [mean, variance] = [0, 0];
    for (let i = 0; i < C; i++) mean += x[i] / C;
    for (let i = 0; i < C; i++) variance += (x[i] - mean) ** 2 / C;
    const scale = 1 / Math.sqrt(variance + EPSILON);
    for (let i = 0; i < C; i++) {
      result[i] = (x[i] - mean) * scale * norm.weight[i] + (norm.bias ? norm.bias[i] : 0);
    }
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
    const { n_head } = this.config;
    this.linear(attention.qkv, x, this.qkv);
    for (let head = 0; head < n_head; head++) {
      this.remember(keys[head], values[head], head, position);
      this.weigh(keys[head], this.queries[head], position + 1);
      probe?.attended(this, position + 1);
      this.mix(values[head], this.mixedOfHead[head], position + 1);
    }
    this.linear(attention.projection, this.mixed, this.update);
  }

  /** Stores the new key as a row and the new value as a column: both are then products with rows. */
  remember(keys, values, head, position) {
    const { d_model: C } = this.config;
    const D = keys.columns;
    for (let i = 0; i < D; i++) {
      keys.values[position * keys.stride + i] = this.qkv[C + head * D + i];
      values.values[i * values.stride + position] = this.qkv[2 * C + head * D + i];
    }
  }

  /**
   * Computes the attention weights of T positions: softmax(keys × query / √D). If D is no multiple of
   * 4, the query's last numbers are those of the next head; the keys have zeros there.
   */
  weigh(keys, query, T) {
    const weights = this.attended;
    this.multiply(weights, keys.values, query, padded(T), keys.stride, keys.stride);
    let largest = -Infinity;
    for (let t = 0; t < T; t++) largest = Math.max(largest, weights[t]);
    const scale = 1 / Math.sqrt(keys.columns);
    let sum = 0;
    for (let t = 0; t < T; t++) sum += weights[t] = Math.exp((weights[t] - largest) * scale);
    for (let t = 0; t < T; t++) weights[t] /= sum;
    weights.fill(0, T, padded(T)); // positions of an earlier context are not seen
  }

  /**
   * Adds up the values of T positions by their weights. If D is no multiple of 4, this also writes
   * zeros to the next head's first numbers, which are computed after it.
   */
  mix(values, mixed, T) {
    this.multiply(mixed, values.values, this.attended, padded(values.rows), padded(T), values.stride);
  }

  /** Two linear layers with an activation function between them. */
  feedForward({ expand, projection }, x) {
    this.linear(expand, x, this.hidden);
    for (let i = 0; i < this.config.d_ff; i++) this.hidden[i] = this.activation(this.hidden[i]);
    this.linear(projection, this.hidden, this.update);
  }

  /**
   * Returns what the stream says about the next token: final LayerNorm, then the head, whose weights
   * are the token embeddings (Press & Wolf 2017).
   * @returns {Float32Array} logits, (V,)
   */
  predict() {
    const x = this.norm(this.pair("final_norm"), this.stream, this.normed);
    this.linear({ weight: this.weights.get("token_embedding.weight") }, x, this.logits);
    return this.logits.slice(0, this.config.vocab_size);
  }
}

/** Returns how many numbers `GPT2` takes from its memory besides the weights. */
function numbersToCompute({ block_size, d_model, d_ff, n_layer, n_head, vocab_size }) {
  const D = padded(d_model / n_head);
  const cache = 2 * n_layer * n_head * D * padded(block_size);
  return cache + 4 * padded(d_model) + padded(3 * d_model) + padded(block_size) + padded(d_ff) + padded(vocab_size) + 8;
}
