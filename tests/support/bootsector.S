# A guest in one sector, which BIOS starts in no time: it says "sector: up" on the first serial port, and does what the
# letters it gets there say. p: power off, r: reset, c: panic (pvpanic), anything else: comes back. A pressed power button
# powers it off. For x86 machines of QEMU's type q35.

        .code16
        .globl  _start
_start: cli
        xor     %ax, %ax
        mov     %ax, %ds
        mov     %ax, %ss
        mov     $0x7c00, %sp
        cld

        # Unreal mode: %fs reaches all 4 GiB, where PCI memory is.
        lgdtl   table
        mov     %cr0, %eax
        or      $1, %al
        mov     %eax, %cr0
        jmp     1f
1:      mov     $8, %bx
        mov     %bx, %fs
        and     $0xfe, %al
        mov     %eax, %cr0
        jmp     1f
1:
        mov     $0x602, %dx             # PM1 enable: the power button counts
        mov     $0x100, %ax
        out     %ax, %dx
        mov     $greeting, %si
say:    lodsb
        test    %al, %al
        jz      wait
        call    put
        jmp     say

wait:   mov     $0x600, %dx             # PM1 status: bit 8 is the power button
        in      %dx, %ax
        test    $0x100, %ax
        jnz     off
        mov     $0x3fd, %dx             # line status: bit 0 is a byte
        in      %dx, %al
        test    $1, %al
        jz      wait
        mov     $0x3f8, %dx
        in      %dx, %al
        cmp     $'p', %al
        je      off
        cmp     $'r', %al
        je      reset
        cmp     $'c', %al
        je      panic
        call    put
        jmp     wait

off:    mov     $0x604, %dx             # PM1 control: sleep enable, type 0 is S5
        mov     $0x2000, %ax
        out     %ax, %dx
        jmp     stop

reset:  mov     $0xcf9, %dx
        mov     $6, %al
        out     %al, %dx
        jmp     stop

panic:  mov     $0x505, %dx             # pvpanic of the ISA bus
        mov     $1, %al
        out     %al, %dx
        xor     %ecx, %ecx              # pvpanic of the PCI bus 0
next:   mov     %ecx, %eax
        shl     $11, %eax
        or      $0x80000000, %eax
        call    config
        cmp     $0x00111b36, %eax
        je      found
        inc     %cx
        cmp     $32, %cx
        jb      next
        jmp     stop
found:  mov     %ecx, %eax
        shl     $11, %eax
        or      $0x80000010, %eax
        call    config
        and     $0xf0, %al
        movb    $1, %fs:(%eax)

stop:   hlt
        jmp     stop

# Reads the PCI configuration word at %eax into %eax.
config: mov     $0xcf8, %dx
        out     %eax, %dx
        mov     $0xcfc, %dx
        in      %dx, %eax
        ret

# Writes %al on the serial port.
put:    mov     %al, %ah
1:      mov     $0x3fd, %dx
        in      %dx, %al
        test    $0x20, %al
        jz      1b
        mov     $0x3f8, %dx
        mov     %ah, %al
        out     %al, %dx
        ret

greeting:
        .asciz  "sector: up\r\n"
        .balign 8
null:   .quad   0
        .quad   0x00cf92000000ffff
table:  .word   table - null - 1
        .long   null

        .org    510
        .word   0xaa55
