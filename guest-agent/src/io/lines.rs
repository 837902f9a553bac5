//! Cuts a stream of bytes into log records.

/// The most one record holds.
pub const LONGEST: usize = 16 * 1024;

/// One piece of a line, without its newline.
#[derive(Debug, PartialEq, Eq)]
pub struct Piece {
    /// When its first byte was read.
    pub time: i64,
    pub data: Vec<u8>,
    /// The line goes on in the next piece.
    pub partial: bool,
}

/// Remembers the beginning of a line until its end has come.
#[derive(Default)]
pub struct Cutter {
    line: Vec<u8>,
    time: i64,
}

impl Cutter {
    /// Takes bytes off the front of `input` until a piece is complete; `None` when the input is used up first.
    ///
    /// A full piece waits for one byte more before it is called partial: if that is the newline, the line fitted.
    pub fn next(&mut self, input: &mut &[u8], now: i64) -> Option<Piece> {
        let (&first, _) = input.split_first()?;
        if self.line.is_empty() {
            self.time = now;
        }
        if self.line.len() == LONGEST && first != b'\n' {
            return Some(self.take(true));
        }
        let room = LONGEST - self.line.len();
        let window = input.get(..input.len().min(room + 1)).unwrap_or(input);
        let newline = window.iter().position(|byte| *byte == b'\n');
        let take = newline.unwrap_or(window.len().min(room));
        let (line, rest) = input.split_at(take);
        self.line.extend_from_slice(line);
        *input = rest;
        if newline.is_some() {
            *input = rest.split_first().map_or(rest, |(_, after)| after);
            return Some(self.take(false));
        }
        self.next(input, now)
    }

    /// What is left when the stream ends: an unterminated last line is still a whole one.
    pub fn finish(&mut self) -> Option<Piece> {
        (!self.line.is_empty()).then(|| self.take(false))
    }

    fn take(&mut self, partial: bool) -> Piece {
        Piece { time: self.time, data: std::mem::take(&mut self.line), partial }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(chunks: &[&[u8]]) -> Vec<(Vec<u8>, bool)> {
        let mut cutter = Cutter::default();
        let mut pieces = Vec::new();
        for chunk in chunks {
            let mut input = *chunk;
            while let Some(piece) = cutter.next(&mut input, 1) {
                pieces.push((piece.data, piece.partial));
            }
            assert!(input.is_empty());
        }
        pieces.extend(cutter.finish().map(|piece| (piece.data, piece.partial)));
        pieces
    }

    #[test]
    fn lines_across_chunks() {
        let pieces = cut(&[b"a\nb", b"c\n\nd", b""]);
        let expected: Vec<(Vec<u8>, bool)> =
            vec![(b"a".into(), false), (b"bc".into(), false), (b"".into(), false), (b"d".into(), false)];
        assert_eq!(pieces, expected);
    }

    #[test]
    fn a_line_that_just_fits_is_whole() {
        let mut line = vec![b'x'; LONGEST];
        line.push(b'\n');
        assert_eq!(cut(&[&line]), [(vec![b'x'; LONGEST], false)]);
        assert_eq!(cut(&[&line[..LONGEST], b"\n"]), [(vec![b'x'; LONGEST], false)]);
        assert_eq!(cut(&[&line[..LONGEST]]), [(vec![b'x'; LONGEST], false)]);
    }

    #[test]
    fn a_longer_line_is_cut() {
        let mut line = vec![b'x'; 2 * LONGEST + 1];
        line.push(b'\n');
        let expected = [(vec![b'x'; LONGEST], true), (vec![b'x'; LONGEST], true), (vec![b'x'; 1], false)];
        assert_eq!(cut(&[&line]), expected);
        let bytes: Vec<&[u8]> = line.chunks(1).collect();
        assert_eq!(cut(&bytes), expected);
        assert_eq!(cut(&[&line[..=LONGEST]]), [(vec![b'x'; LONGEST], true), (vec![b'x'; 1], false)]);
    }

    #[test]
    fn the_time_is_that_of_the_first_byte() {
        let mut cutter = Cutter::default();
        assert!(cutter.next(&mut &b"a"[..], 10).is_none());
        let piece = cutter.next(&mut &b"b\n"[..], 20).unwrap();
        assert_eq!((piece.time, piece.data.as_slice()), (10, &b"ab"[..]));
    }
}
