;; Matrix times vector with WebAssembly SIMD: the product that takes nearly all of a model's time.
;;
;; An instruction acts on four float32 numbers. Four rows are multiplied at the same time: a part of
;; the vector is loaded once for all of them, and their four sums do not wait for each other.
(module
  (import "engine" "memory" (memory 1))

  ;; The sum of the four numbers in a register.
  (func $sum (param $x v128) (result f32)
    (local.set $x (f32x4.add (local.get $x)  ;; x0 + x2, x1 + x3, …
      (i8x16.shuffle 8 9 10 11 12 13 14 15 0 1 2 3 4 5 6 7 (local.get $x) (local.get $x))))
    (f32.add (f32x4.extract_lane 0 (local.get $x)) (f32x4.extract_lane 1 (local.get $x))))

  ;; result[r] = sum over c of matrix[r × stride + c] × vector[c].
  ;; Addresses are in bytes; rows, columns (both multiples of 4) and stride are numbers of float32.
  (func (export "multiply")
    (param $result i32) (param $matrix i32) (param $vector i32)
    (param $rows i32) (param $columns i32) (param $stride i32)
    (local $end i32) (local $x i32) (local $part v128)
    (local $row0 i32) (local $row1 i32) (local $row2 i32) (local $row3 i32)
    (local $sum0 v128) (local $sum1 v128) (local $sum2 v128) (local $sum3 v128)
    (local.set $stride (i32.shl (local.get $stride) (i32.const 2)))  ;; in bytes from here on
    (local.set $end (i32.add (local.get $result) (i32.shl (local.get $rows) (i32.const 2))))
    (block $done
      (loop $rows_left
        (br_if $done (i32.ge_u (local.get $result) (local.get $end)))
        (local.set $row0 (local.get $matrix))
        (local.set $row1 (i32.add (local.get $row0) (local.get $stride)))
        (local.set $row2 (i32.add (local.get $row1) (local.get $stride)))
        (local.set $row3 (i32.add (local.get $row2) (local.get $stride)))
        (local.set $matrix (i32.add (local.get $row3) (local.get $stride)))
        (local.set $sum0 (v128.const f32x4 0 0 0 0))
        (local.set $sum1 (v128.const f32x4 0 0 0 0))
        (local.set $sum2 (v128.const f32x4 0 0 0 0))
        (local.set $sum3 (v128.const f32x4 0 0 0 0))
        (local.set $x (local.get $vector))
        (loop $columns_left
          (local.set $part (v128.load (local.get $x)))
          (local.set $sum0 (f32x4.add (local.get $sum0)
            (f32x4.mul (local.get $part) (v128.load (local.get $row0)))))
          (local.set $sum1 (f32x4.add (local.get $sum1)
            (f32x4.mul (local.get $part) (v128.load (local.get $row1)))))
          (local.set $sum2 (f32x4.add (local.get $sum2)
            (f32x4.mul (local.get $part) (v128.load (local.get $row2)))))
          (local.set $sum3 (f32x4.add (local.get $sum3)
            (f32x4.mul (local.get $part) (v128.load (local.get $row3)))))
          (local.set $row0 (i32.add (local.get $row0) (i32.const 16)))
          (local.set $row1 (i32.add (local.get $row1) (i32.const 16)))
          (local.set $row2 (i32.add (local.get $row2) (i32.const 16)))
          (local.set $row3 (i32.add (local.get $row3) (i32.const 16)))
          (local.set $x (i32.add (local.get $x) (i32.const 16)))
          (br_if $columns_left (i32.lt_u (local.get $x)
            (i32.add (local.get $vector) (i32.shl (local.get $columns) (i32.const 2))))))
        (f32.store (local.get $result) (call $sum (local.get $sum0)))
        (f32.store offset=4 (local.get $result) (call $sum (local.get $sum1)))
        (f32.store offset=8 (local.get $result) (call $sum (local.get $sum2)))
        (f32.store offset=12 (local.get $result) (call $sum (local.get $sum3)))
        (local.set $result (i32.add (local.get $result) (i32.const 16)))
        (br $rows_left)))))
