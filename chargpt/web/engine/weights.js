// The weights of a model: from the text in the page to matrices of float32 in one block of memory.

/** Bytes per number in the page. */
const WIDTHS = { int8: 1, int16: 2, float32: 4 };

/** Returns n rounded up to a multiple of 4: the products read four numbers at a time. */
export function padded(n) {
  return (n + 3) & ~3;
}

/** Memory for all numbers of a model, in one buffer, so that WebAssembly can reach them. */
export class Memory {
  /** @param {ArrayBuffer} buffer */
  constructor(buffer) {
    this.buffer = buffer;
    this.used = 0;
  }

  /**
   * Takes memory for n numbers, all 0.
   * @returns {Float32Array} (n,); its address is a multiple of 16 bytes
   */
  vector(n) {
    const values = new Float32Array(this.buffer, this.used, n);
    this.used += 4 * padded(n);
    return values;
  }

  /** Takes memory for a matrix of zeros. */
  matrix(rows, columns) {
    const stride = padded(columns);
    return { values: this.vector(padded(rows) * stride), rows, columns, stride };
  }
}

/**
 * A matrix in `Memory`. Its rows and columns are padded with zeros to multiples of 4.
 * @typedef {object} Matrix
 * @property {Float32Array} values row after row
 * @property {number} rows without padding
 * @property {number} columns without padding
 * @property {number} stride numbers from one row to the next
 */

/**
 * How a tensor is stored. A matrix of integers has one float32 per row before them, its scale.
 * @typedef {object} StoredTensor
 * @property {string} name as in PyTorch
 * @property {number[]} shape [rows, columns] or [n]
 * @property {"int8" | "int16" | "float32"} type
 * @property {number} offset of its first byte
 */

/** Returns the bytes that `Memory` needs for tensors. */
export function bytesFor(tensors) {
  const sizes = tensors.map(({ shape: [rows, columns] }) =>
    columns === undefined ? padded(rows) : padded(rows) * padded(columns));
  return 4 * sizes.reduce((sum, size) => sum + size, 0);
}

/**
 * Decodes all tensors.
 * @param {StoredTensor[]} tensors
 * @param {Uint8Array} bytes
 * @param {Memory} memory where to put them
 * @returns {Map<string, Matrix | Float32Array>} matrices and vectors by name
 */
export function decodeWeights(tensors, bytes, memory) {
  return new Map(tensors.map((tensor) => {
    const decode = tensor.shape.length === 2 ? decodeMatrix : decodeVector;
    return [tensor.name, decode(tensor, bytes, memory)];
  }));
}

function decodeVector({ shape: [n], offset }, bytes, memory) {
  const vector = memory.vector(n);
  vector.set(new Float32Array(bytes.buffer, offset, n));
  return vector;
}

function decodeMatrix({ shape: [rows, columns], type, offset }, bytes, memory) {
  const matrix = memory.matrix(rows, columns);
  const scales = new Float32Array(bytes.buffer, offset, rows);
  const Integers = type === "int8" ? Int8Array : Int16Array;
  const start = offset + scales.byteLength;
  for (let row = 0; row < rows; row++) {
    const stored = new Integers(bytes.buffer, start + row * columns * WIDTHS[type], columns);
    for (let column = 0; column < columns; column++) {
      matrix.values[row * matrix.stride + column] = scales[row] * stored[column];
    }
  }
  return matrix;
}

/**
 * Decodes base64.
 * @param {string} text
 * @returns {Uint8Array}
 */
export function fromBase64(text) {
  const padding = text.endsWith("==") ? 2 : text.endsWith("=") ? 1 : 0;
  const bytes = new Uint8Array((text.length / 4) * 3 - padding);
  const step = 2 ** 16; // a multiple of 4; piece by piece, because atob's result takes memory, too
  for (let start = 0, at = 0; start < text.length; start += step) {
    const piece = atob(text.slice(start, start + step));
    for (let i = 0; i < piece.length; i++) bytes[at++] = piece.charCodeAt(i);
  }
  return bytes;
}
