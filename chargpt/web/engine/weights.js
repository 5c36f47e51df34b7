// The weights of a model: from the bytes in the page to float32 numbers in one block of memory.

/** Returns n rounded up to a multiple of 4: a product reads and writes four numbers at a time. */
export function padded(n) {
  return (n + 3) & ~3;
}

/**
 * Memory for all numbers of a model, in one buffer, so that WebAssembly can reach them. Without a
 * buffer, it only counts what is taken.
 */
export class Memory {
  /** @param {ArrayBuffer | null} buffer all zeros */
  constructor(buffer) {
    this.buffer = buffer;
    this.used = 0; // bytes
  }

  /**
   * Takes memory for n numbers, and for zeros after them up to a multiple of 4.
   * @returns {Float32Array}
   */
  vector(n) {
    const start = this.used;
    this.used += 4 * padded(n);
    return this.buffer ? new Float32Array(this.buffer, start, padded(n)) : new Float32Array();
  }

  /** @returns {Matrix} of zeros */
  matrix(rows, columns) {
    const stride = padded(columns);
    return { values: this.vector(padded(rows) * stride), rows, columns, stride };
  }

  /** Takes memory for tensors. Returns matrices and vectors by name. */
  tensors(stored) {
    const take = (shape) => (shape.length === 2 ? this.matrix(...shape) : this.vector(...shape));
    return new Map(stored.map(({ name, shape }) => [name, take(shape)]));
  }
}

/**
 * A matrix in `Memory`, whose rows and columns are padded with zeros to multiples of 4.
 * @typedef {object} Matrix
 * @property {Float32Array} values row after row
 * @property {number} rows without padding
 * @property {number} columns without padding
 * @property {number} stride numbers from one row to the next
 */

/**
 * How a tensor is stored. A matrix of integers comes after one float32 per row, the row's scale.
 * @typedef {object} StoredTensor
 * @property {string} name as in PyTorch
 * @property {number[]} shape [rows, columns] or [n]
 * @property {"int8" | "int16" | "float32"} type float32 for vectors, integers for matrices
 * @property {number} offset of its first byte
 */

/**
 * Decodes tensors.
 * @param {StoredTensor[]} tensors
 * @param {Uint8Array} bytes
 * @param {Map<string, Matrix | Float32Array>} weights where to put them
 */
export function decodeWeights(tensors, bytes, weights) {
  for (const { name, shape, type, offset } of tensors) {
    if (type === "float32") {
      weights.get(name).set(new Float32Array(bytes.buffer, offset, shape[0]));
    } else {
      decodeMatrix(weights.get(name), type === "int8" ? Int8Array : Int16Array, bytes, offset);
    }
  }
}

function decodeMatrix({ values, rows, columns, stride }, Integers, bytes, offset) {
  const scales = new Float32Array(bytes.buffer, offset, rows);
  const integers = new Integers(bytes.buffer, offset + scales.byteLength, rows * columns);
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      values[row * stride + column] = scales[row] * integers[row * columns + column];
    }
  }
}

/**
 * Decodes base64.
 * @param {string} text
 * @returns {Uint8Array}
 */
export function fromBase64(text) {
  const padding = text.endsWith("==") ? 2 : text.endsWith("=") ? 1 : 0;
  const bytes = new Uint8Array((text.length / 4) * 3 - padding);
  const step = 2 ** 16; // a multiple of 4; in pieces, because atob's result takes memory, too
  for (let start = 0, at = 0; start < text.length; start += step) {
    const piece = atob(text.slice(start, start + step));
    for (let i = 0; i < piece.length; i++) bytes[at++] = piece.charCodeAt(i);
  }
  return bytes;
}
