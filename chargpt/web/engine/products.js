// Matrix times vector, where nearly all of the time goes: in WebAssembly SIMD (products.wat) or,
// where that is missing, in plain JavaScript. Both work on matrices in one block of memory.

/** products.wat, assembled, in base64: `chargpt export` puts it here. */
export const WASM = "{{products.wasm}}";

const PAGE_BYTES = 2 ** 16; // the unit of WebAssembly's memory

/**
 * Returns a block of memory and the fastest function that multiplies in it.
 * @param {number} n bytes of memory
 * @param {Uint8Array | null} wasm the bytes of products.wasm; null: use plain JavaScript
 * @returns {{buffer: ArrayBuffer, multiply: Function, backend: "wasm simd" | "javascript"}}
 */
export function openProducts(n, wasm) {
  try {
    if (wasm) return openWasm(n, wasm);
  } catch {
    // this browser has no WebAssembly SIMD, or forbids WebAssembly
  }
  return { buffer: new ArrayBuffer(n), multiply, backend: "javascript" };
}

function openWasm(n, wasm) {
  const module = new WebAssembly.Module(wasm);
  const memory = new WebAssembly.Memory({ initial: Math.ceil(n / PAGE_BYTES) });
  const { exports } = new WebAssembly.Instance(module, { engine: { memory } });
  const multiplyArrays = withAddresses(exports.multiply);
  return { buffer: memory.buffer, multiply: multiplyArrays, backend: "wasm simd" };
}

/** Turns a function of addresses into one of arrays. */
function withAddresses(multiplyAt) {
  return (result, matrix, vector, rows, columns, stride) => {
    multiplyAt(result.byteOffset, matrix.byteOffset, vector.byteOffset, rows, columns, stride);
  };
}

/**
 * Computes result[r] = sum over c of matrix[r × stride + c] × vector[c].
 *
 * Four rows at the same time: a number of the vector is loaded once for all of them, and their four
 * sums do not wait for each other.
 * @param {Float32Array} result (rows,)
 * @param {Float32Array} matrix row after row
 * @param {Float32Array} vector (columns,)
 * @param {number} rows a multiple of 4
 * @param {number} columns a multiple of 4
 * @param {number} stride numbers from one row to the next
 */
export function multiply(result, matrix, vector, rows, columns, stride) {
  for (let row = 0; row < rows; row += 4) {
    const start = row * stride;
    let [sum0, sum1, sum2, sum3] = [0, 0, 0, 0];
    for (let column = 0; column < columns; column++) {
      const x = vector[column];
      sum0 += x * matrix[start + column];
      sum1 += x * matrix[start + stride + column];
      sum2 += x * matrix[start + 2 * stride + column];
      sum3 += x * matrix[start + 3 * stride + column];
    }
    result[row] = sum0;
    result[row + 1] = sum1;
    result[row + 2] = sum2;
    result[row + 3] = sum3;
  }
}
